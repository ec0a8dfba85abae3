"""Random words and permutations: the published generator's numbers, every place once, all orders alike."""

from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.data.plan.shuffle import fractions, permute, stream_key, words


def test_words_are_splitmix64s() -> None:
    # The first three outputs for seed 1234567 that the generator's reference implementation prints.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert words(np.uint64(1234567), np.arange(3)).tolist() == expected


def test_keys_name_streams() -> None:
    assert stream_key(1, "walk", "a") == stream_key(1, "walk", "a")
    others = [stream_key(1, "walk", "b"), stream_key(2, "walk", "a"), stream_key("1", "walk", "a")]
    assert len({int(key) for key in [stream_key(1, "walk", "a"), *others]}) == 4


def test_fractions_are_even() -> None:
    drawn = fractions(stream_key("fractions"), np.arange(100_000))
    assert 0 <= drawn.min() < drawn.max() < 1
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    # 10,000 expected with a standard deviation of 95.
    assert np.abs(counts - 10_000).max() < 400


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=20), key=st.integers(0, 2**64 - 1))
def test_every_place_once_whatever_is_asked_with_it(sizes: list[int], key: int) -> None:
    keys = np.arange(len(sizes), dtype=np.uint64) * np.uint64(7919) + np.uint64(key)
    places = np.concatenate([np.arange(size) for size in sizes])
    moved = permute(places, np.repeat(sizes, sizes), np.repeat(keys, sizes))
    start = 0
    for size, own_key in zip(sizes, keys, strict=True):
        here = moved[start : start + size]
        assert sorted(here.tolist()) == list(range(size))
        assert permute(np.arange(size), np.array(size), own_key).tolist() == here.tolist()
        start += size


@pytest.mark.parametrize(("size", "spread"), [(2, 0.03), (3, 0.05), (4, 0.12)])
def test_small_orders_are_about_equally_likely(size: int, spread: float) -> None:
    times = 60_000
    keys = np.repeat(words(np.uint64(5), np.arange(times)), size)
    orders = permute(np.tile(np.arange(size), times), np.array(size), keys).reshape(times, size)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == factorial(size)
    # Three standard deviations of the rarest are 0.7, 2 and 6 %.
    assert np.abs(counts / times * factorial(size) - 1).max() < spread


def test_a_large_permutation_mixes() -> None:
    size = 100_000
    moved = permute(np.arange(size), np.array(size), stream_key("large"))
    assert len(np.unique(moved)) == size
    # The correlation of independent orders has a standard deviation of 1 / sqrt(size) = 0.003.
    assert abs(np.corrcoef(np.arange(size), moved)[0, 1]) < 0.015
    assert abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]) < 0.015
