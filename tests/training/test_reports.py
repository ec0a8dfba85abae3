"""What a rank's report tells the others: who read other rows, by name."""

import pytest
import runs
from helpers import tiny_config

from megatron_iml.config import ParallelConfig
from megatron_iml.training.agree import disagreement
from megatron_iml.training.reports import RankReport, check_reports
from megatron_iml.training.rows import StepRows

# World 8 as TP2 x PP2 x DP2: ranks 0, 1, 4, 5 are replica 0.
CONFIG = tiny_config(parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2))
ROWS = StepRows([], 4, 30, 0, 0, 0.0, 77)


def reports(**changes: dict[int, float]) -> list[RankReport]:
    """Sound reports of eight ranks, with fields of some ranks changed."""
    sound = []
    for rank in range(8):
        replica = (rank // 2) % 2
        targets = {4: 10.0, 6: 20.0}.get(rank, 0.0)
        report = RankReport(num_targets=targets, rows_digest=100.0 + replica, documents_crc=77.0)
        sound.append(report._replace(**{name: by[rank] for name, by in changes.items() if rank in by}))
    return sound


def test_sound_reports_pass() -> None:
    check_reports(reports(), ROWS, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_digest": {4: 5.0}}, r"ranks \[4\] differ from ranks \[0, 1, 5\]: they read other rows"),
        ({"documents_crc": {3: 78.0}}, r"ranks \[3\] differ from ranks \[0, 1, 2, 4, .*: they take other"),
        ({"num_misread": {2: 1.0, 6: 1.0}}, r"ranks \[2, 6\] read rows whose targets or bounds are not"),
        ({"num_targets": {6: 21.0}}, "the model saw 31 targets in this step but the plan holds 30"),
    ],
)
def test_who_read_something_else_is_named(changes: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        check_reports(reports(**changes), ROWS, CONFIG)


def test_the_fewest_are_the_odd_ones() -> None:
    assert disagreement({0: "a", 1: "a"}) is None
    assert disagreement({4: "a", 5: "b"}) == "ranks [5] differ from ranks [4]"
    odd = disagreement({0: "b", 1: "a", 2: "c", 3: "a"})
    assert odd == "ranks [0, 2] differ from ranks [1, 3]"


def test_one_rank_hears_itself() -> None:
    with runs.alone(runs.run_config()) as engine:
        (result,) = runs.take_steps(engine, range(1))
    (report,) = result.reports
    assert report.num_targets == result.num_targets
    assert report.loss_sum / report.num_targets == result.loss
    assert report.forward_seconds > 0
