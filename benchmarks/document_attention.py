"""Document attention against public kernels on the same packed rows: forward and backward apart.

    python benchmarks/document_attention.py --output results [--lengths doc_lengths.npz]
                                            # writes results/document_attention.csv, .md and .png

Mixes: `real`, document lengths drawn from --lengths (arrays prompt_len and target_len, added and clipped to
2,048) or, without it, from a lognormal of median 100 and sigma 1.1; `full`, documents of 2,048; `tree`,
trunks with eight branches, whose peer is our own kernel on plain documents with as many visible pairs. Peers:
FlashAttention-2 varlen as torch ships it, FlexAttention with a document mask (and the time to build it), SDPA
with a dense mask per 2,048 slots, and cuDNN's dense causal attention, which ignores documents, for
orientation. Before a case is timed, the op must keep the error budget of `kernels/testing.py` on the first
4,096 slots of its row; if it does not, the program ends without a number of that case or any after it. Files
are written after every case and say that they are incomplete until the last one.
"""

import argparse
import csv
import functools
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from companions import Timing, measure
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from megatron_iml.kernels.document_attention import (
    DocumentBounds,
    document_attention,
    document_attention_reference,
)
from megatron_iml.kernels.testing import assert_op_within_budget, documents_end, tree_end

LONGEST = 2048
# Plain torch builds slots x slots matrices of every head; at 32,768 slots they would not fit a GPU.
CHECKED_SLOTS = 4096
DTYPE = torch.bfloat16
# A tensor-parallel eighth of OPT-175B; OPT-1.3B whole; half of OPT-30B.
SHAPES = ((12, 128, 32768), (32, 64, 16384), (28, 128, 16384))
"""Heads, head size, slots."""
TRUNK, BRANCHES = 700, (120,) * 8
"""Slots of two demonstrations with their definition, and of eight examples that share them."""


@dataclass(frozen=True)
class Row:
    """A line of the result. Times in milliseconds; `speedup` is the peer's median over ours."""

    mix: str
    heads: int
    head_dim: int
    slots: int
    peer: str
    direction: str
    ours_ms: float
    ours_p20_ms: float
    ours_p80_ms: float
    peer_ms: float
    speedup: float


def real_pool(path: Path | None) -> np.ndarray:
    """Lengths to draw documents from."""
    if path is None:
        return np.random.default_rng(0).lognormal(np.log(100.0), 1.1, 100_000).clip(4, LONGEST).astype(int)
    stored = np.load(path)
    return (stored["prompt_len"] + stored["target_len"]).clip(4, LONGEST)


def draw(pool: Sequence[int] | np.ndarray, slots: int) -> list[int]:
    """Document lengths that add up to `slots`; the last is cut."""
    # The same documents for ours and for every peer.
    rng, lengths = np.random.default_rng(1), []
    while (left := slots - sum(lengths)) > 0:
        lengths.append(int(min(rng.choice(pool), left)))
    return lengths


def random(*shape: int) -> Tensor:
    """Random bf16 numbers that need a gradient."""
    return torch.randn(*shape, device="cuda", dtype=DTYPE).requires_grad_()


def dense(end_T: Tensor, qkv: Tensor) -> tuple[Tensor]:
    """Plain torch with a mask over the row, in the type of qkv: what the budget is measured in."""
    # [N, T, D] each; scores are [N, T, T].
    q, k, v = qkv.permute(2, 1, 0, 3)
    index_T = torch.arange(end_T.numel(), device=end_T.device)
    sees_TT = (index_T <= index_T[:, None]) & (index_T[:, None] < end_T)
    scores = (q @ k.transpose(1, 2) * qkv.shape[3] ** -0.5).masked_fill(~sees_TT, float("-inf"))
    return ((torch.softmax(scores, -1) @ v).transpose(0, 1),)


def attend(
    bounds: DocumentBounds, qkv: Tensor, op: Callable[..., Tensor] = document_attention
) -> tuple[Tensor]:
    """The op in the form of `kernels/testing.py`."""
    return (op(qkv, bounds, qkv.shape[3] ** -0.5),)


def bounds_of(end_T: Tensor) -> DocumentBounds:
    """Bounds as a trainer makes them, which knows the visible pairs of a row."""
    pairs = int((end_T - torch.arange(end_T.numel(), device=end_T.device)).sum())
    return DocumentBounds.from_end(end_T, pairs)


def check(end_T: Tensor, heads: int, head_dim: int) -> None:
    """Raise AssertionError where the kernel leaves its error budget."""
    # Documents that reach beyond are cut at the end, which leaves a valid mask.
    end_T = end_T[:CHECKED_SLOTS].clamp(max=CHECKED_SLOTS)
    bounds = bounds_of(end_T)
    assert_op_within_budget(
        functools.partial(attend, bounds),
        functools.partial(dense, end_T),
        functools.partial(attend, bounds, op=document_attention_reference),
        {"qkv": random(end_T.numel(), heads, 3, head_dim)},
        [random(end_T.numel(), heads, head_dim).detach()],
    )
    # The matrices above would else stay beside what is timed.
    torch.cuda.empty_cache()


def measure_launches(prepare: Callable[[], Callable[[], Any]]) -> Timing:
    """`measure` without a graph, for what a graph may not capture."""
    # warmup and rep are milliseconds; the second-level cache is flushed before each repeat.
    p20, median, p80 = do_bench(prepare(), warmup=20, rep=100, quantiles=[0.2, 0.5, 0.8])
    return Timing(median, p20, p80)


def time_both(
    forward: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor, timer: Callable[..., Timing] = measure
) -> dict[str, Timing]:
    """Forward without autograd's bookkeeping, and backward alone on one forward."""

    def backward() -> Callable[[], Any]:
        """Run the forward, return the backward."""
        out = forward()
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    def without_graph() -> Callable[[], Any]:
        """The forward as inference runs it."""
        return torch.no_grad()(forward)

    return {"forward": timer(without_graph), "backward": timer(backward)}


def time_ours(end_T: Tensor, heads: int, head_dim: int) -> dict[str, Timing]:
    """Our op; the bounds are made before, once for all layers."""
    bounds, qkv = bounds_of(end_T), random(end_T.numel(), heads, 3, head_dim)
    grad = random(end_T.numel(), heads, head_dim).detach()
    return time_both(lambda: attend(bounds, qkv)[0], [qkv], grad)


def time_flash(lengths: list[int], heads: int, head_dim: int) -> dict[str, Timing]:
    """FlashAttention-2 varlen on packed q, k, v."""
    q, k, v, grad = (random(sum(lengths), heads, head_dim).detach() for _ in range(4))
    # int32, as its varlen interface wants cumulative lengths.
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    rows, aten = (starts, starts, max(lengths), max(lengths)), torch.ops.aten
    # The op itself, below autograd: its backward can then be timed alone and in a graph.
    forward = functools.partial(aten._flash_attention_forward, q, k, v, *rows, 0.0, True, False)
    out, lse, seed, unused = forward()[:4]
    backward = functools.partial(
        aten._flash_attention_backward, grad, q, k, v, out, lse, *rows, 0.0, True, seed, unused
    )
    # In CUDA graphs like ours: launches cost neither side anything.
    return {"forward": measure(lambda: forward), "backward": measure(lambda: backward)}


def time_flex(lengths: list[int], heads: int, head_dim: int) -> dict[str, Timing]:
    """FlexAttention, compiled; `mask` is what its block mask costs for every new row."""
    slots = sum(lengths)
    document_T = torch.repeat_interleave(
        torch.arange(len(lengths), device="cuda"), torch.tensor(lengths, device="cuda")
    )

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """FlexAttention's mask_mod: same document, not later."""
        return (document_T[row] == document_T[column]) & (row >= column)

    build = functools.partial(torch.compile(create_block_mask), sees, None, None, slots, slots, device="cuda")
    # dynamic=False: a training row has one length.
    mask, attention = build(), torch.compile(flex_attention, dynamic=False)
    inputs = [random(1, heads, slots, head_dim) for _ in range(3)]
    forward, grad = functools.partial(attention, *inputs, block_mask=mask), torch.randn_like(inputs[0])
    # Compiled backwards give their buffers away, and a second backward would miss them.
    torch._functorch.config.donated_buffer = False
    return time_both(forward, inputs, grad, measure_launches) | {"mask": measure_launches(lambda: build)}


def time_dense(lengths: list[int], heads: int, head_dim: int) -> Iterator[tuple[str, dict[str, Timing]]]:
    """SDPA with a mask per 2,048 slots, and cuDNN without documents."""
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    # [B, 2048]: a mask over the whole row would take slots^2 bytes. Documents are cut where these rows end.
    rows_BL = document_T.view(-1, LONGEST)
    causal = torch.ones(LONGEST, LONGEST, dtype=torch.bool, device="cuda").tril()
    mask = ((rows_BL[:, :, None] == rows_BL[:, None, :]) & causal)[:, None]
    inputs = [random(rows_BL.shape[0], heads, LONGEST, head_dim) for _ in range(3)]
    grad = torch.randn_like(inputs[0])
    masked = functools.partial(scaled_dot_product_attention, *inputs, attn_mask=mask)
    yield "SDPA, dense mask", time_both(masked, inputs, grad, measure_launches)
    # Causal over each 2,048 slots and blind to documents: it computes pairs that nobody needs.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        plain = functools.partial(scaled_dot_product_attention, *inputs, is_causal=True)
        yield "cuDNN, no documents", time_both(plain, inputs, grad, measure_launches)


def compare(mix: str, shape: tuple[int, int, int], peer: str, ours: dict, theirs: dict) -> Iterator[Row]:
    """One line per direction."""
    for direction in ("forward", "backward"):
        own, other = ours[direction], theirs[direction].median
        # Of medians of one run: both sides saw the same clocks.
        speedup = other / own.median
        yield Row(mix, *shape, peer, direction, own.median, own.p20, own.p80, other, speedup)


def flash_rows(mix: str, pool: Sequence[int] | np.ndarray, shape: tuple[int, int, int]) -> Iterator[Row]:
    """Our kernel, once its errors are seen to be in budget, against FlashAttention-2."""
    heads, head_dim, slots = shape
    lengths = draw(pool, slots)
    end_T = documents_end(lengths).cuda()
    check(end_T, heads, head_dim)
    ours = time_ours(end_T, heads, head_dim)
    yield from compare(mix, shape, "FlashAttention-2 varlen", ours, time_flash(lengths, heads, head_dim))


def slow_rows(mix: str, pool: Sequence[int] | np.ndarray, shape: tuple[int, int, int]) -> Iterator[Row]:
    """The same against peers that compile for long, or that compute far more than they need."""
    heads, head_dim, slots = shape
    lengths = draw(pool, slots)
    end_T = documents_end(lengths).cuda()
    check(end_T, heads, head_dim)
    ours = time_ours(end_T, heads, head_dim)
    for peer, theirs in time_dense(lengths, heads, head_dim):
        yield from compare(mix, shape, peer, ours, theirs)
    # Last: it compiles for long, and a run cut short has the others.
    flex = time_flex(lengths, heads, head_dim)
    yield from compare(mix, shape, f"FlexAttention (+ {flex['mask'].median:.3f} for its mask)", ours, flex)


def tree_rows(shape: tuple[int, int, int]) -> Iterator[Row]:
    """Trees against plain documents of one length with as many visible pairs a slot."""
    heads, head_dim, slots = shape
    # 1,660 slots a tree.
    tree_T = tree_end(TRUNK, BRANCHES)
    tree_slots = tree_T.numel()
    pairs = int((tree_T - torch.arange(tree_slots)).sum())
    # A document of L slots has (L + 1) / 2 pairs a slot.
    length = round(2 * pairs / tree_slots - 1)
    count = slots // tree_slots
    end_T = torch.cat([tree_T + index * tree_slots for index in range(count)]).cuda()
    check(end_T, heads, head_dim)
    plain_T = documents_end(draw([length], end_T.numel())).cuda()
    trees, plain = (time_ours(end, heads, head_dim) for end in (end_T, plain_T))
    yield from compare("tree", (heads, head_dim, end_T.numel()), f"ours, documents of {length}", trees, plain)


def all_rows(lengths: Path | None) -> Iterator[Row]:
    """Every case, what tells most first."""
    mixes = {"real": real_pool(lengths), "full": [LONGEST]}
    for shape in SHAPES:
        for mix, pool in mixes.items():
            yield from flash_rows(mix, pool, shape)
        yield from tree_rows(shape)
    for shape in SHAPES:
        for mix, pool in mixes.items():
            yield from slow_rows(mix, pool, shape)


def write(rows: list[Row], folder: Path, command: str, is_whole: bool) -> None:
    """CSV with every digit, Markdown for reading, a plot for seeing."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    with (folder / "document_attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    unfinished = "" if is_whole else " **Incomplete: the run was cut short.**"
    lines = [
        "# Document attention", "",
        f"{torch.cuda.get_device_name()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}; commit {commit.stdout.strip()}; `{command}`. {DTYPE}, milliseconds, "
        "medians with the cache flushed before each repeat; 20th to 80th percentile in brackets. Ours and "
        f"FlashAttention are replays of CUDA graphs.{unfinished}", "",
        "| mix | heads x size, slots | direction | ours | peer | its time | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row.mix} | {row.heads} x {row.head_dim}, {row.slots} | {row.direction} | {row.ours_ms:.3f} "
        f"({row.ours_p20_ms:.3f}-{row.ours_p80_ms:.3f}) | {row.peer} | {row.peer_ms:.3f} "
        f"| {row.speedup:.2f} |"
        for row in rows
    ]
    (folder / "document_attention.md").write_text("\n".join(lines) + "\n")
    # Trees have no peer but ourselves.
    plot([row for row in rows if row.mix != "tree"], folder / "document_attention.png")


def plot(rows: list[Row], path: Path) -> None:
    """How many times as long each peer takes, a panel per direction."""
    figure = Figure(figsize=(12, 0.15 * len(rows) + 1.5), layout="tight")
    for panel, direction in zip(figure.subplots(1, 2), ("forward", "backward"), strict=True):
        shown = [row for row in rows if row.direction == direction][::-1]
        # The peer's name up to what was measured of it.
        names = [f"{row.mix} {row.heads} x {row.head_dim}: {row.peer.split(' (')[0]}" for row in shown]
        panel.barh(names, [row.speedup for row in shown])
        panel.axvline(1.0, color="black", linewidth=1)
        panel.set(title=direction, xlabel="time of the peer / ours")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Check, time, write; after every case, so that a run cut short keeps what it has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--lengths", type=Path, help=".npz with prompt_len and target_len, one per document")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("document_attention: no GPU; the benchmark times GPU kernels, run it where there is one")
    arguments.output.mkdir(parents=True, exist_ok=True)
    command, rows = " ".join(["python", *sys.argv]), list[Row]()
    for row in all_rows(arguments.lengths):
        rows.append(row)
        write(rows, arguments.output, command, is_whole=False)
    write(rows, arguments.output, command, is_whole=True)
    print((arguments.output / "document_attention.md").read_text())


if __name__ == "__main__":
    main()
