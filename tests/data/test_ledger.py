import pytest

from megatron_iml.data.ledger import Drops, TaskCounts


def test_closes_when_every_instance_read_is_written_or_dropped():
    counts = TaskCounts(read=10)
    counts.written.update(train=7, test=1)
    counts.drop("blank target")
    counts.drop("no output")
    counts.check_closes("t")


def test_does_not_close_when_an_instance_is_lost():
    counts = TaskCounts(read=10)
    counts.written["train"] = 9
    with pytest.raises(AssertionError, match="ledger of t does not close: read 10, written 9, dropped 0"):
        counts.check_closes("t")


def test_repairs_do_not_count_as_drops():
    counts = TaskCounts(read=1)
    counts.written["train"] = 1
    counts.repaired["int turned into text"] += 3
    counts.check_closes("t")
    assert counts.as_json() == {
        "read": 1,
        "written": {"train": 1},
        "dropped": {},
        "repaired": {"int turned into text": 3},
    }


def test_reader_and_writer_share_the_account_of_a_task_but_not_of_its_namesake():
    drops = Drops()
    drops.task("FLAN", "squad").read += 5
    assert drops.task("FLAN", "squad").read == 5
    assert drops.task("PromptSource", "squad").read == 0
