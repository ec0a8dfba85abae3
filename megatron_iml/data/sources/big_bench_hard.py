"""BIG-Bench Hard, for evaluation only: its files carry a canary against training.

What enters: `<folder>/bbh/<task>.json`, and `<folder>/cot-prompts/<task>.txt` for their description. What
leaves: one `Task` per file, scored by exact match of the generated answer.

    {"canary": "...", "examples": [{"input": "not True is", "target": "False"}]}
    ->  source "Evaluate the result of a random Boolean expression.\\n\\nQ: not True is\\nA:"
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.text_files import as_text, json_object, source_files, text_lines

BENCHMARK = "BBH"


def read(folder: Path, drops: Drops) -> Iterator[Task]:
    """Tasks of the BIG-Bench-Hard repository.

    Raises:
        ValueError: nothing matches; a file is not JSON or has no list of examples.
    """
    for path in source_files(folder, "bbh/*.json", drops):
        if not isinstance(json_object(path).get("examples"), list):
            raise ValueError(f"{path}: no list `examples`, so not a task of BIG-Bench Hard; remove the file")
        pick = partial(_instances, path, _description(folder / "cot-prompts" / f"{path.stem}.txt"))
        # Exact match: answers are a word, a number or an option's letter, and half of one is wrong.
        yield make_task(drops, BENCHMARK, path.stem, "BBH", pick, metric="exact_match", evaluation_only=True)


def _description(path: Path) -> str:
    """The line below "-----": the canary stands above it, the demonstrations below."""
    if not path.is_file():
        return ""
    # A blank line after the last one, in case the mark is the last.
    lines = [*(line for _, line in text_lines(path)), ""]
    return lines[lines.index("-----") + 1].strip() if "-----" in lines else ""


def _instances(path: Path, description: str, counts: TaskCounts) -> Instances:
    for number, example in enumerate(json_object(path)["examples"]):
        if not isinstance(example, dict):
            yield f"{path.stem}-{number}", "not an object"
            continue
        text, target = as_text(example.get("input"), counts), as_text(example.get("target"), counts)
        if text is None or target is None:
            yield f"{path.stem}-{number}", "no input or no target"
            continue
        # As in the repository's own prompts.
        question = f"Q: {text}\nA:"
        source = f"{description}\n\n{question}" if description else question
        yield f"{path.stem}-{number}", Form(source, (target,), instruction=description)
