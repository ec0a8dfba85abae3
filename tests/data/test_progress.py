"""What long work says in a log file."""

import re

import pytest

from megatron_iml.data.progress import private_memory_bytes, showing_progress


def test_a_log_file_gets_a_line_each_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress("Tokenising", "examples", log_interval=1000) as meter:
        meter.start(4000)
        for _ in range(8):
            meter.advance(300)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [
        re.match(r"Tokenising ([\d,]+) of 4,000 examples, [\d,]+/s, 0:00:\d\d left", line)[1]
        for line in lines
    ] == [
        "1,200",
        "2,400",
    ]
    assert all(re.search(r", [\d,]+ MiB private memory$", line) for line in lines)


def test_more_may_be_done_than_was_expected(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress("Packing", "documents", log_interval=100) as meter:
        for _ in range(3):
            meter.expect(250)
            meter.advance(100)
    lines = capsys.readouterr().err.splitlines()
    pattern = r"Packing (\d+ of \d+) documents, [\d,]+/s, 0:00:00 left"
    counts = [re.match(pattern, line)[1] for line in lines]
    assert counts == ["100 of 250", "200 of 250", "300 of 250"]


def test_private_memory_counts_what_this_process_holds() -> None:
    before = private_memory_bytes()
    held = bytearray(b"x") * (64 << 20)
    assert 60 << 20 < private_memory_bytes() - before < 100 << 20
    del held
