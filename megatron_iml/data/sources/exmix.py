"""ExMix's data sets in the files of their own repositories, each with an instruction sentence of ours.

What enters: the folder of one data set, and which one it is. What leaves: its `Task`s.

    {reader: exmix, folder: COGS/data, options: {data_set: cogs}}
    dev.tsv "The boy ran .\\tboy ( x _ 1 ) ...\\tin_distribution"
    ->  source "Translate the sentence into its logical form.\\nThe boy ran ."

Not read: StylePTB (derived from the Penn Treebank), UKP (behind a form), NewsQuizQA (its articles are
addresses only).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Metric, Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.sources.instructions import instruction_of, load_instructions
from megatron_iml.data.tables import separated_lines, table_rows
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import as_text, json_lines, source_files, text_lines

BENCHMARK = "ExMix"
# An answer with its wrong alternatives, or the reason why there is none.
Answer = tuple[str, tuple[str, ...], tuple[str, ...]] | str


def read(folder: Path, drops: Drops, *, data_set: str = "", instructions: str = "") -> Iterator[Task]:
    """The task of one data set of ExMix.

    Args:
        folder: the data set's repository or a folder inside it.
        drops: where instances are counted.
        data_set: one of `DATA_SETS`.
        instructions: a YAML file of `task: sentence`, relative to `folder`, over those of the package.

    Raises:
        ValueError: no such data set; nothing matches.
    """
    if data_set not in DATA_SETS:
        raise ValueError(f"exmix: no data set {data_set!r}; give the option data_set: {', '.join(DATA_SETS)}")
    pattern, rows = DATA_SETS[data_set]
    paths = source_files(folder, pattern, drops)
    sentence = instruction_of(load_instructions(BENCHMARK, folder, instructions), data_set, BENCHMARK)
    pick = partial(_instances, paths, rows, sentence)
    # Two labels, always the same: elsewhere the wrong answers of a row are not known.
    ranked = data_set in ("gpt2_output", "wikipedia_toxicity_subtypes")
    metric: Metric = "accuracy" if ranked else "rouge_l"
    yield make_task(
        drops, BENCHMARK, data_set, "", pick, metric=metric, data_sources=(data_source(data_set),)
    )


def _instances(
    paths: list[Path],
    rows: Callable[[Path, TaskCounts], Iterator[tuple[int, Answer]]],
    sentence: str,
    counts: TaskCounts,
) -> Instances:
    for path in paths:
        for number, answer in rows(path, counts):
            # The whole name: parallel files differ in their suffix alone.
            id = f"{path.name}-{number}"
            # A tuple is an answer, a text the reason against one.
            if isinstance(answer, str):
                yield id, answer
            else:
                source, targets, candidates = answer
                yield id, Form(f"{sentence}\n{source}", targets, candidates)


def _pairs(path: Path, counts: TaskCounts) -> Iterator[tuple[int, Answer]]:
    """Columns question and program; COGS has the distribution in a third."""
    for number, columns in separated_lines(path):
        yield (
            number,
            (columns[0], (columns[1],), ()) if len(columns) in (2, 3) else "not two or three columns",
        )


def _shakespeare(path: Path, counts: TaskCounts) -> Iterator[tuple[int, Answer]]:
    """`x.modern.nltktok` beside `x.original.nltktok`, line by line."""
    original = path.with_name(path.name.replace("modern", "original"))
    if not original.is_file():
        raise FileNotFoundError(f"{path} has no file {original.name} beside it; a translation needs both")
    pairs = zip(text_lines(path), text_lines(original), strict=True)
    try:
        for (number, modern), (_, old) in pairs:
            yield number, (modern, (old,), ())
    except ValueError as error:
        raise ValueError(
            f"{path}: not as many lines as {original.name} ({error}); the files must agree"
        ) from error


def _gpt2(path: Path, counts: TaskCounts) -> Iterator[tuple[int, Answer]]:
    # By the file: webtext is what people wrote, all others are samples of GPT-2's sizes.
    answer = "no" if path.name.startswith("webtext") else "yes"
    for number, row in json_lines(path):
        text = as_text(row.get("text"), counts)
        yield number, (text, (answer,), ("yes", "no")) if text is not None else "text is not text"


def _intents(path: Path, counts: TaskCounts) -> Iterator[tuple[int, Answer]]:
    for number, row in table_rows(path):
        text, intent = as_text(row.get("text"), counts), as_text(row.get("category"), counts)
        if text is None or intent is None:
            yield number, "no text or no category"
        else:
            # card_arrival is an identifier; the model is to write words.
            yield number, (text, (intent.replace("_", " "),), ())


def _kilt(path: Path, counts: TaskCounts) -> Iterator[tuple[int, Answer]]:
    for number, row in json_lines(path):
        text = as_text(row.get("input"), counts)
        outputs = row.get("output")
        answers = (
            [item.get("answer") for item in outputs if isinstance(item, dict)]
            if isinstance(outputs, list)
            else []
        )
        # KILT's outputs also list evidence without an answer, and an answer more than once.
        targets = tuple(dict.fromkeys(answer for answer in answers if isinstance(answer, str)))
        yield number, (text, targets, ()) if text is not None and targets else "no input or no answer"


def _toxicity(path: Path, counts: TaskCounts) -> Iterator[tuple[int, Answer]]:
    for number, row in table_rows(path):
        text = as_text(row.get("text", row.get("comment_text")), counts)
        label = as_text(row.get("toxicity", row.get("toxic")), counts)
        if text is None or label is None:
            yield number, "no text or no toxicity"
        else:
            # Texts: CSV has no types, and `as_text` has made the others of JSON's.
            yield number, (text, ("no" if label.lower() in ("0", "0.0", "false") else "yes",), ("yes", "no"))


DATA_SETS: Mapping[str, tuple[str, Callable[[Path, TaskCounts], Iterator[tuple[int, Answer]]]]] = {
    # dev, gen, test and train.
    # Not train_100.tsv, which repeats train.tsv.
    "cogs": ("**/[dgt]*[!0].tsv", _pairs),
    "geo_funql": ("**/geo_funql_*.tsv", _pairs),
    "atis_funql": ("**/atis_funql_*.tsv", _pairs),
    # The corrected files; those without the suffix are their first versions.
    "job_funql": ("**/job_funql_*_fixed.tsv", _pairs),
    "shakespearizing": ("**/*.modern.nltktok", _shakespeare),
    "gpt2_output": ("**/*.jsonl", _gpt2),
    # Not train_5.csv and train_10.csv, few-shot draws from train.csv.
    "dialoglue_banking": ("**/*[!0-9].csv", _intents),
    "dialoglue_clinc": ("**/*[!0-9].csv", _intents),
    "dialoglue_hwu": ("**/*[!0-9].csv", _intents),
    "wned": ("**/wned*.jsonl", _kilt),
    "aidayago2": ("**/aidayago2*.jsonl", _kilt),
    "wikipedia_toxicity_subtypes": ("**/*.csv", _toxicity),
}
