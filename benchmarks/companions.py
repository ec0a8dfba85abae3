"""How close the companion kernels come to the chip: bytes against a copy, target_loss against its GEMMs.

    python benchmarks/companions.py --output results       # writes results/companions.csv and companions.md

An elementwise op is as fast as memory: its bar is the share of a device-to-device copy's bandwidth at which
it moves the bytes that it must (each input read once, each output written once; partial sums do not count).
`target_loss` is three GEMMs and two passes: its bar is the time of those GEMMs alone. Before a case is timed
its outputs and gradients, at the size that is timed, must keep the error budget of `kernels/testing.py`; if
they do not, the program ends without writing a number. Times are medians of CUDA graph replays, with the
cache flushed before each.

T slots, F features, V vocabulary, M targets.
"""

import argparse
import csv
import functools
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from companion_cases import DTYPE, SLOTS, elementwise_cases, normal
from torch import Tensor
from torch.nn.functional import cross_entropy
from triton.testing import do_bench

from megatron_iml.kernels.target_loss import target_loss, target_loss_reference
from megatron_iml.kernels.testing import Op, assert_op_within_budget
from megatron_iml.kernels.weight_gradient import accumulate_weight_gradient

WIDTHS = (768, 1024, 2048, 2560, 4096, 5120, 7168, 9216, 12288)
"""Of OPT-125M to OPT-175B."""
LOSS_WIDTHS = (2048, 4096)
# OPT's 50,265 entries, padded to a multiple of 8.
VOCABULARY = 50272
TARGET_SHARE = 0.086
"""Targets per slot in the real mix."""


@dataclass(frozen=True)
class Row:
    """A line of the result. Times in milliseconds; `bound_ms` is what the bar is a share of."""

    op: str
    features: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    torch_ms: float
    bound_ms: float
    ratio: float
    bar: str


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one replay: median and the spread from the 20th to the 80th percentile."""

    median: float
    p20: float
    p80: float


def measure(prepare: Callable[[], Callable[[], Any]]) -> Timing:
    """Time what `prepare` returns, captured in a CUDA graph so that launches cost nothing.

    `prepare` runs on the capturing stream: a backward runs where its forward ran.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = prepare()
        # Triton compiles and tunes in the first calls, which a graph may not capture.
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    p20, median, p80 = do_bench(graph.replay, warmup=20, rep=100, quantiles=[0.2, 0.5, 0.8])
    return Timing(median, p20, p80)


def forward_only(op: Op, inputs: dict[str, Tensor]) -> Callable[[], Callable[[], Any]]:
    """For `measure`: the op on its inputs."""
    return lambda: functools.partial(op, **inputs)


def backward_only(
    op: Op, inputs: dict[str, Tensor], upstream: list[Tensor]
) -> Callable[[], Callable[[], Any]]:
    """For `measure`: the op's backward alone, on one forward."""

    def prepare() -> Callable[[], Any]:
        """Run the forward, return the backward."""
        outputs = op(**inputs)
        # retain_graph: one forward serves all repeats.
        return lambda: torch.autograd.grad(outputs, list(inputs.values()), upstream, retain_graph=True)

    return prepare


def copy_bandwidth() -> float:
    """Bytes per millisecond that a device-to-device copy of 1 GiB reads and writes.

    Not as a graph: a copy is slower as a node of one, and the bars would be lower.
    """
    # 1 GiB of fp32: far beyond the cache, so that memory is what is timed.
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), warmup=20, rep=100, return_mode="median")
    return 2 * source.numel() * source.element_size() / milliseconds


def elementwise_rows(bandwidth: float) -> Iterator[Row]:
    """Check and time every elementwise case."""
    for case in (case for width in WIDTHS for case in elementwise_cases(width)):
        assert_op_within_budget(case.op, case.torch_op, case.reference, case.inputs, case.upstream)
        torch.cuda.empty_cache()
        # Vectors of [features] are left out: a 16,384th of a pass each.
        pass_bytes = SLOTS * case.features * torch.finfo(DTYPE).bits // 8
        for direction, passes in (("forward", case.forward_passes), ("backward", case.backward_passes)):
            if direction == "forward":
                ours, theirs = (measure(forward_only(op, case.inputs)) for op in (case.op, case.torch_op))
            else:
                ours, theirs = (
                    measure(backward_only(op, case.inputs, case.upstream)) for op in (case.op, case.torch_op)
                )
            bound = passes * pass_bytes / bandwidth
            name = f"{case.name} {direction}"
            # 1 would be as fast as a copy; torch's own kernels are timed beside it.
            share = bound / ours.median
            yield Row(
                name, case.features, ours.median, ours.p20, ours.p80, theirs.median, bound, share, ">= 0.75"
            )


def gemms(hidden_MF: Tensor, weight_VF: Tensor, d_logits_MV: Tensor) -> Callable[[], Any]:
    """The three GEMMs of target_loss alone, the weight's gradient in bf16."""

    def function() -> None:
        """Logits, the gradient of the hidden states, the gradient of the weight."""
        torch.mm(hidden_MF, weight_VF.t())
        torch.mm(d_logits_MV, weight_VF)
        torch.mm(d_logits_MV.t(), hidden_MF)

    return function


def accumulating_gemms(
    hidden_MF: Tensor, weight_VF: Tensor, d_logits_MV: Tensor, main_grad_VF: Tensor
) -> Callable[[], Any]:
    """The same with the weight's gradient added to fp32, as target_loss does."""

    def function() -> None:
        torch.mm(hidden_MF, weight_VF.t())
        torch.mm(d_logits_MV, weight_VF)
        accumulate_weight_gradient(main_grad_VF, d_logits_MV, hidden_MF)

    return function


def torch_target_loss(hidden_TF: Tensor, weight_VF: Tensor, rows_M: Tensor, ids_M: Tensor) -> tuple[Tensor]:
    """GEMM and fp32 cross entropy as torch runs them, all logits at once."""
    logits_MV = hidden_TF.index_select(0, rows_M) @ weight_VF.t()
    return (cross_entropy(logits_MV.float(), ids_M, reduction="sum"),)


def loss_rows(features: int) -> Iterator[Row]:
    """Check and time target_loss, forward and backward together, against both kinds of GEMMs."""
    hidden_TF = normal(SLOTS, features)
    # Logits of a standard deviation of 1, so that the softmax is neither flat nor a single word.
    weight_VF = normal(VOCABULARY, features, scale=features**-0.5)
    num_targets = round(TARGET_SHARE * SLOTS)
    # Sorted, as a row's targets are.
    rows_M = torch.randperm(SLOTS, device="cuda")[:num_targets].sort().values
    ids_M = torch.randint(VOCABULARY, (num_targets,), device="cuda")
    pairs = {"target_rows_M": rows_M, "target_ids_M": ids_M}
    inputs = {"hidden_TF": hidden_TF, "weight_VF": weight_VF}
    plain = functools.partial(torch_target_loss, rows_M=rows_M, ids_M=ids_M)
    assert_op_within_budget(
        lambda **inputs: target_loss(**inputs, **pairs)[:1],
        plain,
        lambda **inputs: target_loss_reference(**inputs, **pairs)[:1],
        inputs,
        [torch.ones((), device="cuda")],
    )
    # fp32: with it the weight's gradient is accumulated and not returned, as in training.
    main_grad_VF = torch.zeros(VOCABULARY, features, device="cuda")
    ours = measure(
        lambda: (
            lambda: torch.autograd.grad(
                target_loss(**inputs, **pairs, weight_grad_VF=main_grad_VF)[0], hidden_TF
            )
        )
    )
    # A forward each time, as for ours: the two passes of target_loss share their work.
    theirs = measure(lambda: lambda: torch.autograd.grad(plain(**inputs)[0], [hidden_TF, weight_VF]))
    with torch.no_grad():
        hidden_MF = hidden_TF[rows_M]
        d_logits_MV = torch.softmax((hidden_MF @ weight_VF.t()).float(), dim=1).to(DTYPE)
        operands = (hidden_MF, weight_VF.detach(), d_logits_MV)
        bounds = {
            "plain GEMMs": measure(lambda: gemms(*operands)),
            "GEMMs into fp32": measure(lambda: accumulating_gemms(*operands, main_grad_VF)),
        }
    # Two bounds: GEMMs as torch has them, and with the fp32 accumulation that training cannot do without.
    for name, bound in bounds.items():
        yield Row(
            f"target_loss / {name}", features, ours.median, ours.p20, ours.p80, theirs.median, bound.median,
            ours.median / bound.median, "<= 1.25",
        )  # fmt: skip


def describe(commit: str) -> dict[str, str]:
    """Where and with what the numbers were taken."""
    return {
        "hardware": torch.cuda.get_device_name(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}",
        "commit": commit,
        "command": "python benchmarks/companions.py --output FOLDER",
        "sizes": f"{SLOTS} slots, vocabulary {VOCABULARY}, {round(TARGET_SHARE * SLOTS)} targets, {DTYPE}",
    }


def write(folder: Path, rows: list[Row], facts: dict[str, str]) -> str:
    """Write companions.csv and companions.md; returns the latter's text."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "companions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *facts])
        writer.writeheader()
        writer.writerows(asdict(row) | facts for row in rows)
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "| op | features | ms (p20 to p80) | torch, ms | bound, ms | ratio | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row.median_ms:.3f} ({row.p20_ms:.3f} to {row.p80_ms:.3f})"
        lines.append(
            f"| {row.op} | {row.features} | {spread} | {row.torch_ms:.3f} | {row.bound_ms:.3f} "
            f"| {row.ratio:.2f} | {row.bar} |"
        )
    text = "\n".join(["# Companion kernels", "", *lines, ""])
    (folder / "companions.md").write_text(text)
    return text


def main() -> None:
    """Parse, check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for companions.csv and companions.md"
    )
    parser.add_argument("--commit", help="commit that is measured; default: ask git")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("companions.py: no CUDA device; these numbers exist only on a GPU. Run it on one")
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = (
        arguments.commit or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    )
    # Errors depend on the numbers: a case that keeps its budget keeps it again.
    torch.manual_seed(1)
    # Of this very chip: cards of one name differ.
    bandwidth = copy_bandwidth()
    facts = describe(commit) | {"copy bandwidth": f"{bandwidth / 1e6:.0f} GB/s"}
    rows = list(elementwise_rows(bandwidth))
    rows += [row for width in LOSS_WIDTHS for row in loss_rows(width)]
    print(write(arguments.output, rows, facts))


if __name__ == "__main__":
    main()
