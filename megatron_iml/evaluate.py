"""Evaluate a checkpoint on a bench: three levels of generalisation, one report.

Example: python -m megatron_iml.evaluate --config train.yaml --checkpoint runs/a/checkpoints/iter_0000400 \\
    --baseline runs/a/evaluation/start evaluation.bench=bench evaluation.tokenizer=opt-tokenizer

Under torchrun the ranks divide into tensor parallel x data parallel. An interrupted evaluation goes on where
it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_iml.command import config_parser, run_command

if TYPE_CHECKING:
    from megatron_iml.config import Config


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = config_parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="native or Hugging Face folder; `start` for the weights that training starts from",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the report (default: <training.output_directory>/evaluation/<checkpoint>)",
    )
    parser.add_argument("--baseline", type=Path, help="output folder of another evaluation to compare with")
    return parser.parse_args(arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    """Run or go on with the evaluation, then write and show the report."""
    from rich.console import Console

    from megatron_iml.config import load_config
    from megatron_iml.data.bench.folder import Bench
    from megatron_iml.evaluation.aggregate import aggregate
    from megatron_iml.evaluation.conditions import check_comparable, conditions_from_config
    from megatron_iml.evaluation.open_model import open_model
    from megatron_iml.evaluation.report import Report, read_report, write_report
    from megatron_iml.evaluation.suite import evaluate_bench
    from megatron_iml.evaluation.tables import report_tables, to_rich
    from megatron_iml.evaluation.task import Evaluator

    config = load_config(arguments.config, arguments.overrides)
    # Before the model is loaded: what is missing is said at once.
    bench = Bench.open(bench_folder(config))
    baseline = None if arguments.baseline is None else read_report(arguments.baseline)
    output = arguments.output or default_output(config, arguments.checkpoint)
    console = Console()
    with open_model(config, arguments.checkpoint) as opened:
        # After loading: the fingerprint is of the weights, not of their path.
        conditions = conditions_from_config(
            config,
            checkpoint=arguments.checkpoint,
            checkpoint_fingerprint=opened.fingerprint,
            bench=bench.fingerprint,
            tokenizer=opened.tokenizer.sha256,
        )
        if baseline is not None:
            # Hours before the report would need it.
            check_comparable(conditions, baseline.conditions)
        evaluator = Evaluator(
            opened.model,
            opened.tokenizer,
            conditions,
            row_length=config.data.row_length,
            batch_size=config.evaluation.generation_batch_size,
        )
        scores = evaluate_bench(bench, evaluator, output / "tasks", replicas=opened.replicas, console=console)
        if opened.replicas.writes:
            report = Report(conditions, aggregate(scores))
            # A run elsewhere, or none (a released checkpoint): the report does without the curve.
            metrics = Path(config.training.output_directory) / "metrics.jsonl"
            write_report(output, report, baseline, metrics if metrics.is_file() else None)
            levels, categories, *_ = report_tables(
                report.scores, None if baseline is None else baseline.scores
            )
            # The table of every task needs a page, not a console: report.md has it.
            for table in (levels, categories):
                console.print(to_rich(table))
            console.print(f"report: {output / 'report.md'}", markup=False)


def bench_folder(config: "Config") -> Path:
    """Where the bench lies; ValueError if the config does not say."""
    if config.evaluation.bench is None:
        raise ValueError("evaluation.bench: got none; allowed: a folder written by build_bench.py; set it")
    return Path(config.evaluation.bench)


def default_output(config: "Config", checkpoint: str) -> Path:
    """A folder per checkpoint beside the run's checkpoints: runs/demo/evaluation/iter_0000400."""
    # The name alone: checkpoints of one run have one folder, and another run has another output_directory.
    return Path(config.training.output_directory) / "evaluation" / Path(checkpoint).name


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: evaluate(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
