"""The index against a dictionary: which rows hold which n-gram, which are templates."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from megatron_iml.data.contamination.index import IndexBuilder, NgramIndex, settle_templates


def test_index_is_the_dictionary(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    first_rows = np.array([0, 40, 400])
    known = rng.integers(0, 2**64, 3000, dtype=np.uint64)
    builder = IndexBuilder(tmp_path)
    rows_of: dict[int, set[int]] = defaultdict(set)
    for start in range(0, 400, 100):
        rows = np.repeat(np.arange(start, start + 100), 20)
        hashes = rng.choice(known, len(rows))
        # Rows 0 to 4 of the first file share one n-gram: 5 of 40, more than a twentieth and than four.
        hashes[rows < 5] = known[0]
        # 10 of 360 are no template of the second file.
        hashes[(rows >= 50) & (rows < 60)] = known[1]
        builder.add(hashes, rows)
        for value, row in zip(hashes.tolist(), rows.tolist(), strict=True):
            rows_of[value].add(row)
    builder.finish(first_rows, np.array([0, 1]))
    index = NgramIndex.open(tmp_path)
    assert index.hashes_U.tolist() == sorted(rows_of)

    absent = rng.integers(0, 2**64, 5000, dtype=np.uint64)
    asked = np.concatenate([absent, known])
    places, numbers = index.find(asked)
    expected = [place for place, value in enumerate(asked.tolist()) if value in rows_of]
    assert places.tolist() == expected
    assert index.hashes_U[numbers].tolist() == asked[expected].tolist()
    for place, number in list(zip(places, numbers, strict=True))[::50]:
        assert index.rows_of(np.array([number])).tolist() == sorted(rows_of[int(asked[place])])
    assert index.rows_of(numbers).tolist() == sorted(set().union(*rows_of.values()))

    template = {
        value for value, flag in zip(index.hashes_U.tolist(), index.is_template_U, strict=True) if flag
    }
    assert int(known[0]) in template and int(known[1]) not in template


def test_evaluation_without_any_ngram(tmp_path: Path) -> None:
    builder = IndexBuilder(tmp_path)
    builder.add(np.empty(0, np.uint64), np.empty(0, np.int64))
    builder.finish(np.array([0, 3]), np.array([0]))
    places, numbers = NgramIndex.open(tmp_path).find(np.array([1, 2], np.uint64))
    assert len(places) == len(numbers) == 0


def test_validation_and_test_of_a_task_share_their_templates(tmp_path: Path) -> None:
    # Three rows of each of two files: too few in either, five and more together.
    for tasks, is_template in (([0, 0], True), ([0, 1], False)):
        builder = IndexBuilder(tmp_path)
        builder.add(np.full(6, 7, np.uint64), np.array([0, 1, 2, 10, 11, 12]))
        builder.finish(np.array([0, 10, 20]), np.array(tasks))
        assert NgramIndex.open(tmp_path).is_template_U.tolist() == [is_template]


def test_templates_reach_as_far_as_an_ngram_and_no_further(tmp_path: Path) -> None:
    # Two words each. In the first text 5 is a template and reaches 4 and 6, in the second 6 is none itself.
    texts = [
        (np.array([3, 4, 5, 6, 7], np.uint64), np.zeros(5, int)),
        (np.array([6, 8], np.uint64), np.zeros(2, int)),
    ]
    builder = IndexBuilder(tmp_path)
    for row, (hashes, _) in enumerate(texts):
        builder.add(hashes, np.full(len(hashes), row))
    builder.finish(np.array([0, 2]), np.array([0]))
    (number,) = NgramIndex.open(tmp_path).find(np.array([5], np.uint64))[1]
    settle_templates(tmp_path, [np.array([number])], texts, n=2)
    index = NgramIndex.open(tmp_path)
    assert index.hashes_U[index.is_template_U].tolist() == [4, 5, 6]


FEW_FILES = """
import resource, sys
from pathlib import Path
from megatron_iml.data.contamination.index import IndexBuilder
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
IndexBuilder(Path(sys.argv[1]))
"""


def test_no_more_files_are_open_than_macos_allows(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FEW_FILES, tmp_path], check=True)
