"""One sentence for each task of the benchmarks that come without instructions.

What enters: `instructions.yaml` beside this file, and one of the user's own. What leaves: a task's sentence.

    CrossFit: {blimp: "Which of the two sentences is grammatical?"}
    instruction_of(..., "blimp-wh_questions_object_gap")  ->  "Which of the two sentences is grammatical?"

A sentence serves every task whose name begins with its key at a "-" or "_"; the longest key wins. The
sentences are this project's own words: the paper wrote one for each task too, and did not release them.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_iml.data.text_files import yaml_mapping

OURS = Path(__file__).with_name("instructions.yaml")


def load_instructions(benchmark: str, folder: Path, own: str) -> Mapping[str, str]:
    """Sentences of a benchmark by task, those of the file `own` below `folder` over ours."""
    # A copy: the user's sentences go over ours for this source alone.
    sentences = dict(yaml_mapping(OURS)[benchmark])
    if own:
        # Over ours, so that one sentence can be changed without copying the rest.
        sentences |= yaml_mapping(folder / own)
    for name, sentence in sentences.items():
        if not isinstance(sentence, str) or not sentence.strip():
            raise ValueError(f"instruction of {name!r} is {sentence!r}; give a sentence")
    return sentences


def instruction_of(sentences: Mapping[str, str], name: str, benchmark: str) -> str:
    """The sentence of a task; a task without one is a `ValueError` that says where to write it."""
    # Only at a "-" or "_": the key `art` must not speak for the task `artificial`.
    fitting = [key for key in sentences if name == key or name.startswith((f"{key}-", f"{key}_"))]
    if not fitting:
        raise ValueError(
            f"{benchmark} task {name!r} has no instruction; write `{name}: <a sentence>` into a YAML file "
            "and name it in the reader's option `instructions`"
        )
    return sentences[max(fitting, key=len)]
