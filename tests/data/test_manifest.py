"""A folder of another step, of another version or of nothing is refused by name."""

import json
from pathlib import Path

import pytest

from megatron_iml.data.bench.folder import Bench
from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.folder import Plan

MANIFESTS = {
    "bench": {"format_version": 2, "seed": 1, "splits": {}, "files": []},
    "corpus": {
        "format_version": 1,
        "fingerprint": "f",
        "origin": {},
        "tokenizer": {},
        "shards": [],
        "tasks": [],
    },
}
OPEN = {"bench": Bench.open, "corpus": Corpus.open, "plan": Plan.open}


@pytest.mark.parametrize(
    ("wanted", "given"), [("corpus", "bench"), ("plan", "bench"), ("plan", "corpus"), ("bench", "corpus")]
)
def test_the_folder_of_another_step(tmp_path: Path, wanted: str, given: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFESTS[given]))
    with pytest.raises(ValueError, match=rf"not the manifest of a {wanted} \(no .*build_{wanted}.py wrote"):
        OPEN[wanted](tmp_path)


def test_another_version_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no corpus in .*build_corpus.py wrote"):
        Corpus.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFESTS["bench"], "format_version": 9}))
    with pytest.raises(ValueError, match=r"got format version 9, allowed: 2; build it anew with .*bench.py"):
        Bench.open(tmp_path)
