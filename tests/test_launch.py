"""What the launcher makes of the way its ranks ended."""

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_iml.launch import main


def ended(*statuses: int) -> ChildFailedError:
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=status, error_file="<N/A>")
        for rank, status in enumerate(statuses)
    }
    return ChildFailedError("train", failures)


def test_statuses_that_ranks_explain_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (2, 75):
        given: list[list[str]] = []

        def fail(arguments: list[str], given: list[list[str]] = given, status: int = status) -> None:
            given.append(arguments)
            raise ended(status, status)

        monkeypatch.setattr(torchrun, "main", fail)
        assert main(["--nproc-per-node", "2", "a.py"]) == status
        assert given == [["--nproc-per-node", "2", "a.py"]]


def test_the_first_rank_to_fail_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = ended(2, -9)
    failure.failures[0].timestamp = failure.failures[1].timestamp + 1
    monkeypatch.setattr(torchrun, "main", lambda arguments: (_ for _ in ()).throw(failure))
    with pytest.raises(ChildFailedError, match="exitcode  : -9"):
        main([])


def test_a_crash_keeps_its_account_and_success_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "main", lambda arguments: (_ for _ in ()).throw(ended(1)))
    with pytest.raises(ChildFailedError):
        main([])
    monkeypatch.setattr(torchrun, "main", lambda arguments: None)
    assert main([]) == 0
