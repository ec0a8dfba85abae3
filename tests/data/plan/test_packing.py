"""Packing: best fit is what it says, windows end where they must, real documents fill their rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import write_lengths
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.data.plan.draws import DrawStream
from megatron_iml.data.plan.mixture import Mixture
from megatron_iml.data.plan.packing import PackingConfig, best_fit, pack_window

LENGTHS = Path(__file__).parents[3].parent / "shared" / "lengths" / "doc_lengths_mixture.npz"
CONFIG = PackingConfig(mixture=Mixture(50), row_length=64, rows=40, seed=7)


@settings(max_examples=100, deadline=None)
@given(slots=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_against_the_definition(slots: list[int]) -> None:
    row_of, rows = best_fit(np.array(slots), 20)
    free: list[int] = []
    for document in sorted(range(len(slots)), key=lambda i: -slots[i]):
        fitting = [space for space in free if space >= slots[document]]
        if fitting:
            free[free.index(min(fitting))] -= slots[document]
        else:
            free.append(20 - slots[document])
    assert rows == len(free)
    used = np.bincount(row_of, weights=slots, minlength=rows)
    assert sorted(20 - used) == sorted(free)


@settings(max_examples=40, deadline=None)
@given(slots=st.lists(st.integers(1, 8), min_size=40, max_size=80), rows=st.integers(1, 9))
def test_exact_number_of_rows(tmp_path_factory: pytest.TempPathFactory, slots: list[int], rows: int) -> None:
    # 40 documents or more of 8 slots at most need 5 rows of 8 or more; 9 need 65 slots or more.
    if sum(slots) < 8 * rows:
        slots = slots + [8] * rows
    count = len(slots)
    lengths = (np.ones(count, dtype=int), np.array(slots))
    corpus = write_lengths(tmp_path_factory.mktemp("rows") / "corpus", {"A__b__c": lengths})
    once = np.array([count])
    stream = DrawStream(corpus.task_records, once, once, limit=9, seed=1, windows=1)
    whole = pack_window(corpus, stream, replace(CONFIG, row_length=8), 0)
    assert whole.tally["packed"].tolist() == [count]
    assert whole.rows.slots_R.sum() == sum(slots)
    rows = min(rows, len(whole.rows.slots_R))
    packed = pack_window(corpus, stream, replace(CONFIG, row_length=8), 0, rows)
    assert len(packed.rows.slots_R) == rows
    assert packed.rows.slots_R.min() > 0
    assert packed.rows.slots_R.max() <= 8
    # A beginning of the stream, and as long as it can be: the next document fits no row.
    drawn = whole.tally["drawn"] if rows == len(whole.rows.slots_R) else packed.tally["drawn"]
    assert packed.tally["packed"].tolist() == drawn.tolist() == [len(packed.rows.entries)]


def test_pairs_and_slots_of_a_known_window(tmp_path: Path) -> None:
    lengths = (np.array([3, 1, 0]), np.array([3, 3, 5]))
    corpus = write_lengths(tmp_path / "corpus", {"A__b__c": lengths})
    once = np.array([3])
    stream = DrawStream(corpus.task_records, once, once, limit=9, seed=1, windows=1)
    rows = pack_window(corpus, stream, replace(CONFIG, row_length=8), 0).rows
    by_row = sorted(zip(*(x.tolist() for x in (rows.slots_R, rows.targets_R, rows.pairs_R)), strict=True))
    # 6 and 4 tokens lie in one row of 5 + 3 slots, the text of 5 in another; its first token is no target.
    assert by_row == [(4, 4, 4 * 5 // 2), (8, 6, 5 * 6 // 2 + 3 * 4 // 2)]


def test_impossible_configs() -> None:
    with pytest.raises(ValueError, match="have 65536 tokens; a plan holds at most 65535"):
        PackingConfig(Mixture(), row_length=65535, rows=3, seed=1, max_positions=1 << 17)
    with pytest.raises(ValueError, match="rows 0, row_length 8.*at least 1"):
        PackingConfig(Mixture(), row_length=8, rows=0, seed=1)
    with pytest.raises(ValueError, match="branches is -1, expected 0"):
        PackingConfig(Mixture(), row_length=8, rows=1, seed=1, branches=-1)
    with pytest.raises(ValueError, match="row_length 65536: where prefixes are shared"):
        PackingConfig(Mixture(), row_length=65536, rows=1, seed=1, branches=3)


@pytest.mark.skipif(not LENGTHS.is_file(), reason=f"real document lengths are not at {LENGTHS}")
@pytest.mark.parametrize("row_length", [2048, 8192, 16384])
def test_fill_on_real_lengths(tmp_path: Path, row_length: int) -> None:
    stored = np.load(LENGTHS)
    # Their order is that of the tasks they came from.
    parts = zip(*(np.array_split(stored[name], 50) for name in ("prompt_len", "target_len")), strict=True)
    corpus = write_lengths(tmp_path / "corpus", {f"A__b__t{k}": part for k, part in enumerate(parts)})
    once = np.array([len(task.documents) for task in corpus.task_records])
    stream = DrawStream(corpus.task_records, once, once, limit=2049, seed=1, windows=12)
    config = replace(CONFIG, row_length=row_length)
    slots = np.concatenate([pack_window(corpus, stream, config, number).rows.slots_R for number in range(12)])
    assert slots.sum() > 30e6
    assert slots.mean() / row_length >= 0.995
