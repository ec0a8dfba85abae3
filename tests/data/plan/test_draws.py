"""Draws: every prefix of the stream walks its tasks in turn, references are all met, long documents cut."""

from pathlib import Path

import numpy as np
import pytest
from corpora import lengths_document, write_corpus

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan import draws as plan_draws
from megatron_iml.data.plan.draws import Draws, DrawStream, Lengths, draw_window, measure_tasks
from megatron_iml.data.plan.shares import UNBOUNDED

QUOTAS = np.array([25, 31, 200, 7])


def draw(corpus: Corpus, quotas: np.ndarray, windows: int, units: int = 1) -> Draws:
    """All windows of so many units of time, one after another."""
    most = np.full(len(quotas), UNBOUNDED)
    stream = DrawStream(corpus.task_records, quotas, most, limit=65, seed=1, windows=windows)
    drawn = [draw_window(corpus, stream, number) for number in range(units * windows)]
    joined = (
        np.concatenate([getattr(window, name) for window in drawn])
        for name in ("task_N", "document_N", "reference_N")
    )
    return Draws(*joined, drawn[0].lengths)


@pytest.mark.parametrize("windows", [1, 2, 5, 37])
def test_windows_cut_one_stream(mixed_corpus: Corpus, windows: int) -> None:
    whole, cut = draw(mixed_corpus, QUOTAS, 1), draw(mixed_corpus, QUOTAS, windows)
    assert cut.task_N.tolist() == whole.task_N.tolist()
    assert cut.document_N.tolist() == whole.document_N.tolist()
    assert cut.reference_N.tolist() == whole.reference_N.tolist()


@pytest.mark.parametrize("fraction", [0.0, float(np.nextafter(1, 0))])
def test_no_draw_is_lost_or_doubled_where_windows_meet(
    mixed_corpus: Corpus, monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    # Both ends of what may come at random: on a border, and so near the next one that sums round to it.
    monkeypatch.setattr(plan_draws, "fractions", lambda key_N, index_N: np.full(len(index_N), fraction))
    for windows in (3, 7, 11, 23, 49):
        for quotas in (QUOTAS, np.array([49, 3, 77, 11]), np.array([47, 1, 29, 98])):
            stream = DrawStream(mixed_corpus.task_records, quotas, quotas, 65, 1, windows)
            tasks = [draw_window(mixed_corpus, stream, n).task_N for n in range(stream.last_window + 1)]
            assert np.bincount(np.concatenate(tasks), minlength=4).tolist() == quotas.tolist()


def test_the_stream_goes_on_at_the_same_rates(mixed_corpus: Corpus) -> None:
    draws = draw(mixed_corpus, QUOTAS, windows=3, units=4)
    assert np.bincount(draws.task_N).tolist() == (4 * QUOTAS).tolist()


def test_a_bound_silences_a_task(mixed_corpus: Corpus) -> None:
    most = np.array([30, 31, UNBOUNDED, 0])
    stream = DrawStream(mixed_corpus.task_records, QUOTAS, most, limit=65, seed=1, windows=2)
    tasks = np.concatenate([draw_window(mixed_corpus, stream, number).task_N for number in range(8)])
    assert np.bincount(tasks, minlength=4).tolist() == [30, 31, 800, 0]
    assert stream.last_window > 10**15
    bounded = DrawStream(mixed_corpus.task_records, QUOTAS, np.array([30, 31, 9, 0]), 65, 1, windows=2)
    assert bounded.last_window == 3  # 30 draws at 25 in two windows


def test_stream_walks_each_task_in_turn(mixed_corpus: Corpus) -> None:
    # Any prefix of the stream, not only the whole: otherwise stopping at the last row would break the rule.
    tasks = list(mixed_corpus.task_records)
    draws = draw(mixed_corpus, QUOTAS, windows=3)
    assert np.bincount(draws.task_N).tolist() == [25, 31, 200, 7]
    for k, task in enumerate(tasks):
        drawn = draws.document_N[draws.task_N == k]
        size = len(task.documents)
        assert len(set(drawn[:size].tolist())) == min(size, len(drawn))
        assert (drawn[size:] == drawn[: len(drawn) - size]).all() if len(drawn) > size else True
    # Spread evenly: half of the stream holds half of every task's draws, within one or two.
    half = np.bincount(draws.task_N[: len(draws.task_N) // 2], minlength=4)
    assert (np.abs(half - np.array([12.5, 15.5, 100, 3.5])) < 4).all()


def test_references_are_all_drawn(mixed_corpus: Corpus) -> None:
    tasks = list(mixed_corpus.task_records)
    draws = draw(mixed_corpus, np.array([2000, 0, 0, 0]), windows=2)
    for document in tasks[0].documents:
        drawn = draws.reference_N[draws.document_N == document]
        assert set(drawn.tolist()) == set(range(mixed_corpus.num_references(document)))


@pytest.mark.parametrize(
    ("source", "target", "cut", "length", "kept"),
    [
        (6, 3, 0, 9, True),  # limit tokens take limit - 1 slots: the whole row of 8
        (7, 3, 1, 9, True),
        (20, 3, 14, 9, True),
        (20, 8, 19, 9, True),  # one token of the source stays
        (20, 9, 20, 9, False),
        (1, 8, 0, 9, True),
        (0, 9, 0, 9, True),  # without a source the target may be the whole document
        (0, 10, 1, 9, False),
        (0, 2, 0, 2, True),
        (0, 1, 0, 1, False),  # an empty text: only its end, which nothing predicts
        (5, 1, 0, 6, True),
    ],
)
def test_cut_and_drop(source: int, target: int, cut: int, length: int, kept: bool) -> None:
    lengths = Lengths(np.array([source]), np.array([target]), limit=9)
    assert (lengths.cut_N[0], lengths.length_N[0], bool(lengths.kept_N[0])) == (cut, length, kept)


def test_measured_sizes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", {"A__x__y": [lengths_document(4, 2, 4), lengths_document(30, 3)]})
    (size,) = measure_tasks(corpus, corpus.task_records, limit=20)
    # (mean of 6 and 8, 20 after the cut) / 2; targets (mean of 2 and 4, 3) / 2.
    assert (size.documents, size.tokens, size.target_tokens) == (2, 13.5, 3.0)
