"""Answer prompts with a checkpoint, greedily, as the evaluation does.

Example: python -m megatron_iml.generate --config train.yaml --checkpoint runs/a/checkpoints/iter_0000400 \\
    --prompt $'2 + 2 =\\nA:' evaluation.tokenizer=opt-tokenizer

Answers are JSON lines {"id", "src", "answer", "finished"}; `finished` is false where
evaluation.max_new_tokens ended it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_iml.command import config_parser, run_command

if TYPE_CHECKING:
    from megatron_iml.evaluation.question import Question


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = config_parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="native or Hugging Face folder; `start` for the weights that training starts from",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt, as it is")
    source.add_argument("--prompts", type=Path, help="JSON lines with src and perhaps id, e.g. a bench file")
    parser.add_argument("--output", type=Path, help="file for the answers (default: the console)")
    return parser.parse_args(arguments)


def read_prompts(arguments: argparse.Namespace) -> list["Question"]:
    """Prompts in their order; ids are the file's, or numbers."""
    from megatron_iml.data.text_files import json_lines
    from megatron_iml.evaluation.question import Question

    if arguments.prompt is None and not arguments.prompts.exists():
        raise FileNotFoundError(
            f"--prompts: got {arguments.prompts}, which is not there; allowed: JSON lines; correct the path"
        )
    if arguments.prompt is not None:
        # As it is: a backslash and an n may begin a \nabla; a shell's $'...' makes newlines.
        return [Question("0", arguments.prompt, ())]
    # The line and not the place: a reader finds an answer's prompt by its number, blank lines or not.
    questions = []
    for number, row in json_lines(arguments.prompts):
        if not isinstance(row.get("src"), str):
            raise ValueError(
                f"{arguments.prompts}:{number}: no text `src`, which every line needs; fix or remove it"
            )
        questions.append(Question(str(row.get("id", number)), row["src"], ()))
    if not questions:
        raise ValueError(
            f"--prompts: got {arguments.prompts}, which is empty; allowed: a line or more; add one"
        )
    return questions


def answer(arguments: argparse.Namespace) -> None:
    """Generate all answers, then write them."""
    import orjson

    from megatron_iml.config import load_config
    from megatron_iml.data.files import write_atomically
    from megatron_iml.evaluation.conditions import longest_document
    from megatron_iml.evaluation.generation import generate
    from megatron_iml.evaluation.open_model import open_model
    from megatron_iml.evaluation.prompts import prompt_rules
    from megatron_iml.evaluation.replicas import merge, shard

    config = load_config(arguments.config, arguments.overrides)
    questions = read_prompts(arguments)
    # Now, not after an hour of answers that then have nowhere to go.
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--output: got {arguments.output}; allowed: a file in a folder that exists; make it"
        )
    with open_model(config, arguments.checkpoint) as opened:
        replicas = opened.replicas
        mine = generate(
            opened.model,
            opened.tokenizer,
            shard(questions, replicas.rank, replicas.size),
            rules=prompt_rules(
                config.model.inference_prefix, opened.tokenizer.eos_id, longest_document(config)
            ),
            max_new_tokens=config.evaluation.max_new_tokens,
            batch_size=config.evaluation.generation_batch_size,
            track=iter,
        )
        answers = merge(replicas.gather(mine))
        content = b"".join(
            orjson.dumps({"id": q.id, "src": q.prompt, "answer": a.text.strip(), "finished": a.finished})
            + b"\n"
            for q, a in zip(questions, answers, strict=True)
        )
        if replicas.writes and arguments.output is not None:
            write_atomically(arguments.output, content)
        elif replicas.writes:
            sys.stdout.write(content.decode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: answer(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
