"""Prompts that show solved examples first: a k-shot bench from a zero-shot one.

What enters: a bench. What leaves: another, whose prompts show demonstrations of their own task, drawn by
seed, task and id.

    task-level instruction (Super-NaturalInstructions, reasoning): after it and before the input
        "Instructions: Name the capital.\\n\\nInput: Mali\\nAnswer: Bamako\\n\\nInput: Togo\\nAnswer:"
    instance-level instruction (PromptSource, FLAN, ...): before the whole prompt
        "Is the sea wet?\\nA: Yes\\n\\nIs the sun wet?\\nA:"

Demonstrations are training rows of the task. A held-out task has none: its test prompts show validation
rows, and the other way round, so no prompt shows what its own split asks. Each demonstration keeps the
delimiter it has. Pretraining text (no source) stays as it is.

For MetaICL-style training the number of demonstrations is drawn from Zipf's law, k = Zipf(a) - 1, at most
`shots`: with a = 2 and 5 shots 61 % of the prompts stay zero-shot, 15 % show one demonstration.
"""

import hashlib
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import orjson

from megatron_iml.data.bench.folder import FORMAT_VERSION, LEDGER, Bench, BenchFile, BenchRow, manifest_bytes
from megatron_iml.data.bench.splits import Split
from megatron_iml.data.bench.staging import put_in_place, working_folder
from megatron_iml.data.example import instance_hash
from megatron_iml.data.manifest import MANIFEST

# Where the demonstrations of a split come from, the first that the task has.
POOLS: dict[Split, tuple[Split, ...]] = {
    "train": ("train",),
    "validation": ("train", "test"),
    "test": ("train", "validation"),
}
FEWER = "fewer demonstrations than drawn: the task has no more"
TOO_LONG = "demonstration left out: the prompt would be too long"


@dataclass(frozen=True)
class Demonstrations:
    """How prompts are shown; recorded in the manifest of the bench."""

    shots: int
    """Demonstrations of a prompt; with `zipf` the most there are."""
    zipf: float = 0.0
    """Exponent a of Zipf's law for their number; 0 gives every prompt `shots` of them."""
    separator: str = "\n\n"
    """Between demonstrations; the paper's MetaICL ablation had three newlines."""
    longest_source: int = 6000
    """Characters of a prompt with its demonstrations, about 1,500 tokens: the left would be cut, and with it
    the instruction."""
    pool: int = 2000
    """Rows of a task that demonstrations are drawn from, the first ones of its file."""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.shots < 1 or self.pool < 1 or self.longest_source < 1:
            raise ValueError(
                f"demonstrations: got shots {self.shots}, pool {self.pool}, longest_source "
                f"{self.longest_source}; give 1 or more of each"
            )
        if self.zipf and self.zipf <= 1:
            raise ValueError(
                f"demonstrations: zipf is {self.zipf}; give more than 1, or 0 for a fixed number"
            )


def shot_shares(how: Demonstrations) -> list[float]:
    """Share of prompts with 0, at most 1, ... at most `shots - 1` demonstrations; all others have `shots`."""
    if not how.zipf:
        return [0.0] * how.shots
    terms = 10_000
    # Zeta of the exponent: the sum, and the integral of what it leaves out.
    zeta = sum(n**-how.zipf for n in range(1, terms)) + terms ** (1 - how.zipf) / (how.zipf - 1)
    return list(accumulate((k + 1) ** -how.zipf / zeta for k in range(how.shots)))


def add_demonstrations(
    bench: Bench, how: Demonstrations, output: Path, splits: Sequence[Split] = ("validation", "test")
) -> Bench:
    """Write the files of some splits with demonstrations as a new bench.

    Args:
        bench: a zero-shot bench.
        how: number, order and length.
        output: the new folder; must not exist.
        splits: what is written; `train` only when asked.

    Raises:
        ValueError: `output` exists, or the splits have no file.
    """
    if output.exists():
        raise ValueError(f"{output} exists already; give another --output, or remove it")
    files = [entry for split in splits for entry in bench.files(split)]
    if not files:
        raise ValueError(f"{bench.folder} has no file in {', '.join(splits)}; choose other splits")
    # Beside its place and renamed: nobody meets half a bench.
    with working_folder(output) as folder:
        _write_bench(bench, files, how, folder / "bench")
        put_in_place(folder / "bench", output)
    return Bench.open(output)


def _write_bench(bench: Bench, files: Sequence[BenchFile], how: Demonstrations, staging: Path) -> None:
    entries: list[BenchFile] = []
    accounts: dict[str, dict[str, Any]] = {}
    for entry in files:
        written, repaired = _write_file(bench, entry, how, staging)
        entries.append(written)
        account = accounts.setdefault(entry.stem, {"read": 0, "written": {}, "dropped": {}, "repaired": {}})
        # Nothing is dropped here: all that is read is written, so the ledger closes.
        account["read"] += entry.examples
        account["written"][entry.split] = entry.examples
        account["repaired"] = dict(sorted((Counter(account["repaired"]) + repaired).items()))
    ledger = {"format_version": FORMAT_VERSION, "tasks": accounts, "skipped_files": {}}
    (staging / LEDGER).write_bytes(orjson.dumps(ledger, option=orjson.OPT_INDENT_2) + b"\n")
    origin = {"demonstrations": asdict(how), "zero_shot_bench": bench.fingerprint}
    (staging / MANIFEST).write_bytes(manifest_bytes(bench.seed, origin, entries))


def with_demonstrations(row: BenchRow, shown: Sequence[BenchRow], separator: str) -> BenchRow:
    """A row whose prompt shows others first; `instruction` still says how much of it is the task's."""
    instruction = row.get("instruction", 0)
    solved = [_solved(demonstration) for demonstration in shown]
    # The separator stands in for the newlines between instruction and input.
    rest = row["src"][instruction:].lstrip("\n") if instruction else row["src"]
    parts = [row["src"][:instruction], *solved, rest] if instruction else [*solved, rest]
    return {**row, "src": separator.join(parts)}


def _solved(row: BenchRow) -> str:
    source = row["src"][row.get("instruction", 0) :].lstrip("\n")
    # One space, as the tokeniser's side joins source and target (corpus/encoding.py).
    return f"{source.rstrip(' ')} {row['tgt']}"


def _write_file(
    bench: Bench, entry: BenchFile, how: Demonstrations, staging: Path
) -> tuple[BenchFile, Counter[str]]:
    pool = _pool(bench, entry, how.pool)
    shares = shot_shares(how)
    digest, repaired = hashlib.sha256(), Counter[str]()
    with (staging / entry.file).open("wb") as file:
        for row in bench.rows(entry):
            line = orjson.dumps(_shown(row, pool, entry.stem, shares, how, repaired)) + b"\n"
            digest.update(line)
            file.write(line)
    return replace(entry, sha256=digest.hexdigest()), repaired


def _pool(bench: Bench, entry: BenchFile, size: int) -> list[BenchRow]:
    holders = {each.split: each for each in bench.entries if each.stem == entry.stem}
    # A held-out task has no training file: then it is the other split of the two.
    for split in POOLS[entry.split]:
        if split in holders:
            return list(islice(bench.rows(holders[split]), size))
    return []


def _shown(
    row: BenchRow,
    pool: Sequence[BenchRow],
    stem: str,
    shares: Sequence[float],
    how: Demonstrations,
    repaired: Counter[str],
) -> dict[str, Any]:
    # A text has no question that demonstrations could stand before.
    if not row["src"].strip():
        return dict(row)
    key = f"{stem} {row['id']}"
    # The number of shares at or below a draw from [0, 1]: with none at 0.0 it is all of `shots`.
    wanted = bisect(shares, instance_hash(how.seed, "number of shots", key) / 2**64)
    # Not itself, nor a row that asks the same: either would show the answer.
    others = _draw(pool, wanted, how.seed, key, row["src"])
    if len(others) < wanted:
        repaired[FEWER] += 1
    shown = with_demonstrations(row, others, how.separator)
    while others and len(shown["src"]) > how.longest_source:
        # The one farthest from the question.
        others = others[1:]
        repaired[TOO_LONG] += 1
        shown = with_demonstrations(row, others, how.separator)
    return dict(shown)


def _draw(pool: Sequence[BenchRow], wanted: int, seed: int, key: str, source: str) -> list[BenchRow]:
    """`wanted` distinct rows of the pool, in an order that follows from the key, none with this source."""
    drawn: dict[int, BenchRow] = {}
    # Enough to find all of a small pool but for bad luck (5 of 5 rows: 999 times in 1,000), and an end where
    # too few are to be had.
    for attempt in range(4 * (wanted + len(pool)) if wanted else 0):
        index = instance_hash(seed, f"demonstration {attempt}", key) % max(1, len(pool))
        if pool and index not in drawn and pool[index]["src"] != source:
            drawn[index] = pool[index]
            if len(drawn) == wanted:
                break
    return list(drawn.values())
