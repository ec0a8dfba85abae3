"""Writes source files of any size for the preprocessing benchmarks: distinct documents, real lengths.

    python benchmarks/generated_sources.py --output sources --tokenizer-model opt-tokenizer \\
        --lengths doc_lengths_mixture.npz --examples 18000000 --tasks 1545

What leaves: `<output>/GEN<b>__Category_<c>__task<n>.jsonl`, rows {"id", "src", "tgt"[, "references"]}, which
the reader `source_target` reads. Task sizes are log-normal and at most 100,000; lengths in tokens are drawn
from the file's `prompt_len` and `target_len`. Words are the tokenizer's own, the frequent ones more often, so
a word is about one token; one in a hundred is two words run together, which no cache of words has met. (Real
Super-NaturalInstructions follow Heaps's law with exponent 0.55: a third as many new words in a million
documents.) Every second task repeats an instruction. A task depends on the seed and its number alone: files
that are there are kept, and any process may write any of them.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import orjson

# Eight, as the paper has; GEN and a letter, so that nobody takes them for real ones.
BENCHMARKS = ("GENA", "GENB", "GENC", "GEND", "GENE", "GENF", "GENG", "GENH")
# As the paper's training split: 1,545 tasks in 93 categories.
CATEGORIES = 93
LARGEST_TASK = 100_000
CHUNK = 4096
# Words that no cache has met: without them gigatoken would only look words up.
RARE_SHARE = 0.01
# Tokens a word of the mix has on average, and tokens that the bench's delimiter and `</s>` add.
TOKENS_PER_WORD = 1.2
TOKENS_AROUND = 4
INSTRUCTION_WORDS = 30
TABLE_BITS = 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What is written, and from what."""

    output: Path
    tokenizer: Path
    lengths: Path
    examples: int
    tasks: int
    seed: int


def task_sizes(settings: Settings) -> list[int]:
    """Examples of every task: log-normal, at most LARGEST_TASK, `examples` in all."""
    # One example a task at least, and none above the cap: else no scale satisfies both.
    if not settings.tasks <= settings.examples <= settings.tasks * LARGEST_TASK:
        raise ValueError(
            f"{settings.tasks} tasks cannot hold {settings.examples} examples of 1 to {LARGEST_TASK} each"
        )
    weights = np.random.default_rng(settings.seed).lognormal(0.0, 1.2, settings.tasks)
    low, high = 0.0, float(LARGEST_TASK / weights.min())
    # The scale at which the capped sizes sum to what is asked for, to within one example a task.
    # Bisection: 100 halvings are more than a double has bits.
    for _ in range(100):
        scale = (low + high) / 2
        sizes = np.clip(weights * scale, 1, LARGEST_TASK).astype(np.int64)
        low, high = (scale, high) if sizes.sum() <= settings.examples else (low, scale)
    sizes = np.clip(weights * low, 1, LARGEST_TASK).astype(np.int64)
    below_cap = np.flatnonzero(sizes < LARGEST_TASK)
    sizes[below_cap[: settings.examples - int(sizes.sum())]] += 1
    return [int(size) for size in sizes]


@cache
def word_table(tokenizer: Path) -> tuple[list[str], np.ndarray]:
    """Words with their leading blank, and 2^20 draws of them in the proportion of their frequency."""
    vocabulary = orjson.loads(next(tokenizer.glob("*vocab.json")).read_bytes())
    # Ids of OPT's vocabulary are in the order of frequency.
    plain = [
        f" {token[1:]}"
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        if token[0] == "\u0120" and token[1:].isascii() and token[1:].isalpha()
    ]
    words = plain + [f"{word}," for word in plain[:3000]] + [f"{word}." for word in plain[:3000]]
    rank = np.concatenate([np.arange(len(plain)), np.arange(3000) * 10, np.arange(3000) * 10])
    # Zipf's law with an offset, which flattens the most frequent words as in text.
    weights = 1.0 / (rank + 20.0)
    counts = np.maximum(1, weights / weights.sum() * (1 << TABLE_BITS)).astype(np.int64)
    # A table of 2^20 draws: a word is one gather, where a draw by weights is a search.
    table = np.repeat(np.arange(len(words), dtype=np.int32), counts)
    return words, table


def sentences(rng: np.random.Generator, settings: Settings, words_N: np.ndarray) -> list[str]:
    """N texts of the given numbers of words."""
    words, table = word_table(settings.tokenizer)
    drawn = [words[i] for i in table[rng.integers(0, len(table), int(words_N.sum()))].tolist()]
    for place in rng.integers(1, max(len(drawn), 2), int(len(drawn) * RARE_SHARE)).tolist():
        drawn[place] += drawn[place - 1].strip(" ,.")
    stops = np.cumsum(words_N).tolist()
    starts = [0, *stops]
    return ["".join(drawn[start:stop])[1:] for start, stop in zip(starts, stops, strict=False)]


def write_task(settings: Settings, number: int, size: int) -> int:
    """Write one task, or keep it if it is there; return its examples."""
    name = f"{BENCHMARKS[number % len(BENCHMARKS)]}__Category_{number % CATEGORIES}__task{number:04d}"
    path = settings.output / f"{name}.jsonl"
    if path.is_file():
        return size
    # By the task's number: any process may write it, before or after any other.
    rng = np.random.default_rng((settings.seed, number))
    lengths = np.load(settings.lengths)
    prompts, targets = lengths["prompt_len"], lengths["target_len"]
    instruction = sentences(rng, settings, np.array([INSTRUCTION_WORDS]))[0] if number % 2 else ""
    # The reader's glob is *.jsonl: half a file of a killed run is not seen.
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for first in range(0, size, CHUNK):
            count = min(CHUNK, size - first)
            drawn = rng.integers(0, len(prompts), count)
            around = TOKENS_AROUND + (INSTRUCTION_WORDS if instruction else 0)
            prompt_words = np.maximum(3, (prompts[drawn] - around) / TOKENS_PER_WORD).astype(np.int64)
            target_words = np.maximum(1, targets[drawn] / TOKENS_PER_WORD).astype(np.int64)
            sources = sentences(rng, settings, prompt_words)
            answers = sentences(rng, settings, target_words)
            for index, (source, answer) in enumerate(zip(sources, answers, strict=True), start=first):
                row = {"id": f"{number}-{index}", "src": f"{instruction}\nInput: {source}", "tgt": answer}
                # As in the real mix, a few examples have a second reference.
                if index % 10 == 0:
                    row["references"] = [answer, f"{answer} {index}"]
                file.write(orjson.dumps(row) + b"\n")
    partial.replace(path)
    return size


def parse_arguments() -> Settings:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the source files")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="whose entries are the words")
    parser.add_argument("--lengths", type=Path, required=True, help="npz with prompt_len and target_len")
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    settings = Settings(
        arguments.output,
        arguments.tokenizer_model,
        arguments.lengths,
        arguments.examples,
        arguments.tasks,
        arguments.seed,
    )
    settings.output.mkdir(parents=True, exist_ok=True)
    sizes = task_sizes(settings)
    with ProcessPoolExecutor(arguments.workers) as pool:
        written = sum(pool.map(write_task, [settings] * len(sizes), range(len(sizes)), sizes))
    print(f"{written:,} examples in {len(sizes)} tasks in {settings.output}")
    return settings


if __name__ == "__main__":
    parse_arguments()
