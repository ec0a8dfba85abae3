"""Convert weights between Hugging Face, metaseq and native checkpoints; a killed conversion goes on.

Examples:
  python tools/checkpoint/convert.py native --input opt-6.7b --output weights/opt-6.7b --inference-prefix eos
  python tools/checkpoint/convert.py hugging-face --input run/checkpoints/iter_0004000 --output export \\
      --tokenizer-model opt-tokenizer --verify
  python tools/checkpoint/convert.py metaseq --input weights/opt-30b --output parts --parts 2

What --input is, is found out. Native weights start a run (checkpoint.initial_weights) or are evaluated.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_iml.command import at_least_one, command_parser, run_command

if TYPE_CHECKING:
    from megatron_iml.checkpoint.conversion.source import Source
    from megatron_iml.checkpoint.conversion.target import Target


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--input", type=Path, required=True, help="folder, or one file of metaseq's")
    common.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    common.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="round to it (default: keep every bit)"
    )
    common.add_argument("--vocab-size", type=int, help="embedding rows: zeros are added, or rows cut off")
    common.add_argument(
        "--num-attention-heads", type=at_least_one, help="for metaseq files of an unpublished size"
    )
    common.add_argument("--verify", action="store_true", help="compare logits before the output appears")
    parser = command_parser(__doc__)
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORMAT")
    # A parent, not an option of all: metaseq's files have no place for it.
    prefix = argparse.ArgumentParser(add_help=False)
    prefix.add_argument(
        "--inference-prefix",
        choices=("none", "eos"),
        help="token before prompts: eos for base OPT, none for tuned models (default: as the input says); a "
        "Hugging Face folder says it with --tokenizer-model only",
    )
    forms.add_parser("native", parents=[common, prefix], help="megatron-core's distributed format")
    hugging_face = forms.add_parser(
        "hugging-face", parents=[common, prefix], help="a folder for transformers"
    )
    hugging_face.add_argument(
        "--tokenizer-model", type=Path, help="folder with vocab.json and merges.txt, to add"
    )
    hugging_face.add_argument("--container", choices=("safetensors", "bin"), default="safetensors")
    hugging_face.add_argument(
        "--max-shard-bytes", type=at_least_one, default=5_000_000_000, help="per file (default: %(default)s)"
    )
    metaseq = forms.add_parser("metaseq", parents=[common], help="singleton, parts, or training files")
    metaseq.add_argument(
        "--parts", type=at_least_one, default=1, help="tensor-parallel parts (default: %(default)s)"
    )
    metaseq.add_argument("--shards", type=at_least_one, help="flatten, and cut each part into so many files")
    return parser.parse_args(arguments)


def plan(arguments: argparse.Namespace, source: "Source") -> "Target":
    """The target that the command line asks for."""
    # Late, here and below: torch takes a second, and `--help` needs none of it.
    from dataclasses import replace

    from megatron_iml.checkpoint.conversion.convert import types_of
    from megatron_iml.checkpoint.conversion.target import inference_prefix, vocabulary
    from megatron_iml.checkpoint.conversion.targets.hugging_face import (
        HuggingFaceOptions,
        hugging_face_target,
    )
    from megatron_iml.checkpoint.conversion.targets.metaseq import metaseq_target
    from megatron_iml.checkpoint.conversion.targets.native import native_target

    # Before the vocabulary is changed: types are the source's, tensor by tensor.
    types = types_of(source, dtype_of(arguments))
    model = replace(source.model, vocab_size=vocabulary(source, arguments.form, arguments.vocab_size))
    if arguments.form == "native":
        prefix = inference_prefix(source, arguments.inference_prefix)
        return native_target(replace(model, inference_prefix=prefix), types)
    if arguments.form == "metaseq":
        return metaseq_target(model, types, arguments.parts, arguments.shards)
    if arguments.inference_prefix and not arguments.tokenizer_model:
        raise ValueError(
            f"--inference-prefix: got {arguments.inference_prefix} without --tokenizer-model, whose settings "
            "are the only place for it in a Hugging Face folder; add --tokenizer-model, or leave it out"
        )
    options = HuggingFaceOptions(
        container=arguments.container,
        max_shard_bytes=arguments.max_shard_bytes,
        tokenizer=arguments.tokenizer_model,
        # Without a tokenizer nothing is written that could say it.
        prefix=inference_prefix(source, arguments.inference_prefix) if arguments.tokenizer_model else "none",
    )
    return hugging_face_target(model, types, options)


def dtype_of(arguments: argparse.Namespace):  # noqa: ANN201 - torch is not imported here
    """The type to round to, or None."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}[arguments.dtype]


def run(arguments: argparse.Namespace) -> str:
    """Convert behind a progress bar; returns what was done."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from megatron_iml.checkpoint.conversion.convert import convert, total_bytes
    from megatron_iml.checkpoint.conversion.formats import open_source
    from megatron_iml.checkpoint.conversion.verification import verifier

    began = time.monotonic()
    # Names, shapes and files of all tensors are checked here: before the work, not in the middle of it.
    source = open_source(arguments.input, arguments.num_attention_heads)
    target, dtype = plan(arguments, source), dtype_of(arguments)
    total = total_bytes(source, target, dtype)
    # The bar on one stream, the result on the other: a script reads the latter.
    console = Console(stderr=True)
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # The first two are the text and the bar.
    columns = (*Progress.get_default_columns()[:2], *columns)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{source.kind} to {target.kind}", total=total)
        verify = verifier(source, dtype) if arguments.verify else None
        convert(source, target, arguments.output, dtype, lambda count: progress.advance(bar, count), verify)
    seconds = time.monotonic() - began
    checked = "logits compared" if arguments.verify else "logits not compared (--verify)"
    return (
        f"{arguments.output}: {target.kind}, {total:,} bytes in {len(target.files)} weight files from "
        f"{source.kind} {arguments.input}; {seconds:.1f} s; {checked}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: print(run(parse_arguments(arguments))))


if __name__ == "__main__":
    sys.exit(main())
