"""CrossFit: few-shot TSV files, whose tasks get an instruction sentence of our own.

What enters: `<folder>/**/<task>/<task>_<k>_<seed>_{train,dev,test}.tsv`, no header: an input, then one or
more alternative outputs. What leaves: one `Task` for each task folder, all its draws together.

    codah/codah_16_100_train.tsv  "My friend (A) ran. (B) sat.\\tsat.\\tsat"
    ->  source "Choose the most plausible ending of the text.\\nMy friend (A) ran. (B) sat."
        targets ("sat.", "sat")

Draws of several seeds share rows, and every draw repeats the test file: a line that was read before is
dropped.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Task, source_hash
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.sources.instructions import instruction_of, load_instructions
from megatron_iml.data.tables import separated_lines
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import source_files

BENCHMARK = "CrossFit"


def read(folder: Path, drops: Drops, *, instructions: str = "") -> Iterator[Task]:
    """Tasks of CrossFit's data folder.

    Args:
        folder: the folder that holds one folder for each task.
        drops: where instances are counted.
        instructions: a YAML file of `task: sentence`, relative to `folder`, over those of the package.

    Raises:
        ValueError: a file name without k, seed and split; a task without an instruction.
    """
    sentences = load_instructions(BENCHMARK, folder, instructions)
    tasks: dict[str, list[Path]] = {}
    for path in source_files(folder, "**/*.tsv", drops):
        # From the right: a task's own name holds underscores.
        name, *draw = path.stem.rsplit("_", 3)
        if len(draw) != 3 or not draw[0].isdigit() or not draw[1].isdigit():
            raise ValueError(
                f"{path}: expected a name <task>_<k>_<seed>_<split>.tsv; rename or remove the file"
            )
        tasks.setdefault(name, []).append(path)
    for name, paths in sorted(tasks.items()):
        sentence = instruction_of(sentences, name, BENCHMARK)
        pick = partial(_instances, paths, sentence)
        # One hyphen parts a data set from its subset: glue-mrpc, race-high.
        source = (data_source(name.replace("-", "__", 1)),)
        yield make_task(drops, BENCHMARK, name, "", pick, data_sources=source)


def _instances(paths: Sequence[Path], sentence: str, counts: TaskCounts) -> Instances:
    seen: set[int] = set()
    for path in paths:
        for number, columns in separated_lines(path):
            # Alternatives stand in columns of their own, and their number differs from line to line.
            text, *outputs = columns
            # A hash in place of the line: five draws of a task hold its test file five times.
            line = source_hash("\t".join(columns))
            if line in seen:
                yield f"{path.stem}-{number}", "repeats a line of another draw"
                continue
            seen.add(line)
            # After the repeats: a blank line of five draws is one fault of the data, and counted once.
            if not text.strip() or not any(output.strip() for output in outputs):
                yield f"{path.stem}-{number}", "no input or no output"
                continue
            yield f"{path.stem}-{number}", Form(f"{sentence}\n{text.strip()}", tuple(outputs))
