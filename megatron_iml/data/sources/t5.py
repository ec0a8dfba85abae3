"""T5's supervised tasks that no other benchmark has: six pairs of WMT, and CNN/DailyMail.

What enters: `<folder>/<task>/`, tables with Hugging Face's columns or WMT's parallel files. What leaves: one
`Task` for each folder. The direction of a translation is the end of the task's name, before a version.

    wmt16_enro_v003/train.jsonl {"translation": {"en": "Hello.", "ro": "Salut."}}
    wmt14_ende/train.en, train.de  "Hello.", "Hallo."
    ->  source "Translate the English text to German.\\nHello.", targets ("Hallo.",)
    cnn_dailymail_v002/train.csv   article, highlights
    ->  source "Summarize the article.\\n...", targets (highlights,)
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.sources.instructions import instruction_of, load_instructions
from megatron_iml.data.tables import KINDS, table_rows
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import as_text, source_files, text_lines

BENCHMARK = "T5"
LANGUAGES: Mapping[str, str] = {
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "fi": "Finnish",
    "fr": "French",
    "ro": "Romanian",
    "ru": "Russian",
}


def read(folder: Path, drops: Drops, *, instructions: str = "") -> Iterator[Task]:
    """Tasks of a folder that holds one folder for each.

    Args:
        folder: holds `wmt16_enro`, `cnn_dailymail` and the like, with or without `_v003`.
        drops: where instances are counted.
        instructions: a YAML file of `task: sentence`, relative to `folder`, over those of the package;
            `{source}` and `{target}` in it are languages.

    Raises:
        ValueError: a task without an instruction or with a language unknown here; nothing matches.
    """
    sentences = load_instructions(BENCHMARK, folder, instructions)
    folders: dict[str, list[Path]] = {}
    # One folder down and no further: a task's folder holds its files itself.
    for path in source_files(folder, "*/*.*", drops):
        folders.setdefault(path.parent.name, []).append(path)
    for full_name, paths in sorted(folders.items()):
        # T5's registry numbers versions of a task; categories and data sources know the name without.
        name = re.sub(r"_v\d+$", "", full_name)
        sentence = instruction_of(sentences, name, BENCHMARK)
        if name.startswith("wmt"):
            source, target = _languages(folder / full_name, name)
            # Not str.format: the user's sentence may hold other braces.
            for slot, language in (("{source}", source), ("{target}", target)):
                sentence = sentence.replace(slot, LANGUAGES[language])
            pick = partial(_translations, paths, source, target, sentence)
        else:
            pick = partial(_summaries, paths, sentence)
        yield make_task(drops, BENCHMARK, name, "", pick, data_sources=(data_source(name),))


def _languages(folder: Path, name: str) -> tuple[str, str]:
    # wmt16_enro: the last four letters, whatever stands before.
    source, target = name[-4:-2], name[-2:]
    if source not in LANGUAGES or target not in LANGUAGES:
        raise ValueError(
            f"{folder}: a name of a translation ends in two languages of {', '.join(LANGUAGES)}, such as "
            "wmt16_enro; rename the folder"
        )
    return source, target


def _translations(
    paths: Sequence[Path], source: str, target: str, sentence: str, counts: TaskCounts
) -> Instances:
    for path in paths:
        pairs: Iterator[tuple[int, tuple[object, object]]]
        if path.suffix in KINDS:
            pairs = ((number, _pair(row, source, target)) for number, row in table_rows(path))
        elif path.suffix == f".{source}":
            pairs = _parallel(path, path.with_suffix(f".{target}"))
        else:
            # The other half of a pair of files, or nothing of ours.
            continue
        for number, (text, translation) in pairs:
            question, answer = as_text(text, counts), as_text(translation, counts)
            if question is None or answer is None or not question.strip():
                yield f"{path.stem}-{number}", f"no text in {source} or {target}"
            else:
                yield f"{path.stem}-{number}", Form(f"{sentence}\n{question.strip()}", (answer,))


def _pair(row: dict[str, object], source: str, target: str) -> tuple[object, object]:
    # Hugging Face nests the pair; people who flatten it keep the two columns.
    pair = row.get("translation", row)
    return (pair.get(source), pair.get(target)) if isinstance(pair, dict) else (None, None)


def _parallel(path: Path, other: Path) -> Iterator[tuple[int, tuple[object, object]]]:
    # By name beside it: train.en goes with train.de, whatever else the folder holds.
    if not other.is_file():
        raise FileNotFoundError(f"{path} has no file {other.name} beside it; a translation needs both")
    try:
        for (number, text), (_, translation) in zip(text_lines(path), text_lines(other), strict=True):
            yield number, (text, translation)
    except ValueError as error:
        raise ValueError(f"{path}: does not go with {other.name} line by line ({error})") from error


def _summaries(paths: Sequence[Path], sentence: str, counts: TaskCounts) -> Instances:
    for path in paths:
        for number, row in table_rows(path):
            article, summary = as_text(row.get("article"), counts), as_text(row.get("highlights"), counts)
            if article is None or summary is None or not article.strip():
                yield f"{path.stem}-{number}", "no article or no highlights"
            else:
                yield f"{path.stem}-{number}", Form(f"{sentence}\n{article.strip()}", (summary,))
