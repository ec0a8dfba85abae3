"""Philox against Random123's own vectors and against Triton's, and the masks drawn from it."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_iml.kernels.philox import PLACES, dropout_key, keep_mask, keep_threshold, philox

# Random123-1.14, tests/kat_vectors, the three lines "philox4x32 10": counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    result = philox(key[0] | key[1] << 32, tuple(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in result) == words


TRITON_PROGRAM = """
import torch, triton, triton.language as tl
from megatron_iml.kernels.philox import philox

@triton.jit
def four_words(out, seed, N: tl.constexpr):
    lane = tl.arange(0, N)
    zero = lane * 0
    words = tl.philox(seed, lane, lane * 77777 + 5, zero + 3, zero)
    tl.store(out + lane, words[0].to(tl.int64))
    tl.store(out + N + lane, words[1].to(tl.int64))
    tl.store(out + 2 * N + lane, words[2].to(tl.int64))
    tl.store(out + 3 * N + lane, words[3].to(tl.int64))

# A key of nothing, of its low half alone, of both halves.
for key in (0, 5, 0x0123456789ABCDEF):
    out = torch.empty(4, 64, dtype=torch.int64)
    four_words[(1,)](out, key, 64)
    lane = torch.arange(64)
    three, zero = torch.full_like(lane, 3), torch.zeros_like(lane)
    ours = torch.stack(philox(key, (lane, lane * 77777 + 5, three, zero)))
    assert torch.equal(out & 0xFFFFFFFF, ours), key
"""


def test_triton_computes_the_same_function() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # In a process of its own: the interpreter is chosen when triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # From standard input: unlike the compiler, the interpreter needs no source file of a kernel.
    result = subprocess.run(
        [sys.executable, "-"], input=TRITON_PROGRAM, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_key_depends_on_everything_that_names_a_mask() -> None:
    base = dropout_key(1234, row=7, layer=0, place="attention")
    assert base == dropout_key(1234, row=7, layer=0, place="attention")
    assert 0 <= base < 2**64
    others = {
        dropout_key(1235, 7, 0, "attention"),
        dropout_key(1234, 8, 0, "attention"),
        dropout_key(1234, 7, 1, "attention"),
        dropout_key(1234, 7, -1, "attention"),
        *(dropout_key(1234, 7, 0, place) for place in PLACES),
    }
    # Four that differ in one thing each, and four places, one of which is the base's.
    assert len(others) == 8 and base in others


def test_a_part_of_the_coordinates_gives_that_part_of_the_mask() -> None:
    key = dropout_key(1, 2, 3, "attention")
    rows, columns, planes = torch.arange(40), torch.arange(53), torch.arange(6)
    whole = keep_mask(key, 0.3, rows, columns, planes)
    assert whole.shape == (6, 40, 53)
    # Columns that start inside a group of four, and columns with gaps: a branch sees its prefix and itself.
    for part in (torch.arange(5, 20), torch.tensor([0, 1, 2, 9, 10, 50, 52]), torch.tensor([52])):
        assert torch.equal(keep_mask(key, 0.3, rows[7:9], part, planes[4:]), whole[4:, 7:9][:, :, part])


def test_each_element_is_the_word_that_the_head_of_the_module_says() -> None:
    key = dropout_key(1, 2, 3, "embedding")
    mask = keep_mask(key, 0.5, torch.tensor([11]), torch.tensor([21]), torch.tensor([4]))
    words = philox(key, tuple(torch.tensor([c]) for c in (11, 21 // 4, 4, 0)))
    # Column 21 is word 1 of group 5.
    assert bool(mask) == (int(words[21 % 4]) >= 2**31)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_of_dropped_elements(probability: float) -> None:
    keys = [dropout_key(9, row, 0, "attention") for row in range(20)]
    axis = torch.arange(200)
    masks = torch.stack([keep_mask(key, probability, axis, axis, torch.arange(2)) for key in keys]).double()
    # 1.6 million draws: five standard deviations of their mean.
    sigma = (probability * (1 - probability) / masks.numel()) ** 0.5
    assert abs(masks.mean() - (1 - probability)) < 5 * sigma
    # Neighbours along every axis are independent: the correlation of n pairs is 1 / sqrt(n).
    centred = masks - masks.mean()
    for axis_number in range(4):
        length = masks.shape[axis_number] - 1
        pairs = centred.narrow(axis_number, 0, length) * centred.narrow(axis_number, 1, length)
        correlation = pairs.mean() / (probability * (1 - probability))
        assert abs(correlation) < 5 / pairs.numel() ** 0.5, f"axis {axis_number}"


def test_thresholds_at_the_ends() -> None:
    assert keep_threshold(0.0) == 0
    assert keep_threshold(0.5) == 2**31
    # Rounded it would be 2^32, which a comparison of 32-bit words takes for 0: everything kept.
    assert keep_threshold(1.0 - 2.0**-33) == 2**32 - 1
    axis = torch.arange(100)
    assert keep_mask(1, 0.0, axis, axis, axis[:1]).all()
