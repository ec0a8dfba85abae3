"""Files are whole or absent."""

from pathlib import Path

import pytest

from megatron_iml.data.files import write_atomically


def test_new_content_replaces_old_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", b"old")
    write_atomically(tmp_path / "a.json", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"new"}


def test_killed_before_the_rename_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a.json", b"old")

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"
