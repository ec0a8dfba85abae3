"""Building a corpus: the same bytes however it is built, killed builds that go on, inputs that do not fit."""

import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import pytest
from corpora import ROWS, build, write_bench

from megatron_iml.data.corpus.build import BuildConfig, build_corpus
from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.corpus.tokenizer import Tokenizer, train_byte_level_bpe
from megatron_iml.data.jobs import Job, claim

ROOT = Path(__file__).parents[3]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("change", [{"workers": 2}, {"backend": "tokenizers"}])
def test_bytes_do_not_depend_on_workers_or_backend(
    config: BuildConfig, corpus: Corpus, tmp_path: Path, change: dict
) -> None:
    other = build(replace(config, output=tmp_path, **change))
    assert digests(other.folder) == digests(corpus.folder)
    assert sorted(digests(corpus.folder)) == ["manifest.json", "shard-00000.bin", "shard-00000.idx"]


def test_shards_of_whole_tasks_hold_the_same_documents(
    config: BuildConfig, corpus: Corpus, tmp_path: Path
) -> None:
    sharded = build(replace(config, output=tmp_path, shard_examples=3))
    assert len(sharded.manifest["shards"]) == 3
    assert sharded.tasks == corpus.tasks
    documents = np.arange(corpus.num_documents)
    last = corpus.reference_counts(documents) - 1
    assert sharded.reference_counts(documents).tolist() == corpus.reference_counts(documents).tolist()
    assert (
        np.array(sharded.lengths(documents, last)).tolist()
        == np.array(corpus.lengths(documents, last)).tolist()
    )
    for document in range(corpus.num_documents):
        assert sharded.tokens(document, int(last[document]))[0].tolist() == (
            corpus.tokens(document, int(last[document]))[0].tolist()
        )


def test_killed_build_keeps_its_finished_shards(config: BuildConfig, tmp_path: Path) -> None:
    sharded = replace(config, output=tmp_path, shard_examples=3)

    class Killed(Exception):
        pass

    def die_in_second_shard(examples: int, tokens: int) -> None:
        if examples == 3:
            raise Killed

    with pytest.raises(Killed):
        build_corpus(sharded, start=lambda examples: None, advance=die_in_second_shard)
    first = tmp_path / "train" / "shard-00000.bin"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "train" / "shard-00001.bin").exists()
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        Corpus.open(tmp_path / "train")
    heard: list[int] = []
    build_corpus(
        sharded, start=lambda examples: None, advance=lambda examples, tokens: heard.append(examples)
    )
    assert first.stat().st_mtime_ns == written
    assert sum(heard) == 44
    whole = build(replace(sharded, output=tmp_path / "again"))
    assert digests(tmp_path / "train") == digests(whole.folder)


STALLED_BUILD = """
import sys, time
from pathlib import Path
from megatron_iml.data.corpus.build import BuildConfig, build_corpus
from megatron_iml.data.jobs import Job, claim

def stall(examples, tokens):
    print("stalled", flush=True)
    time.sleep(120)

if __name__ == "__main__":
    bench, tokenizer, output = map(Path, sys.argv[1:])
    build_corpus(BuildConfig(bench, "train", tokenizer, output, workers=2), lambda examples: None, stall)
"""


def test_killed_build_leaves_no_workers(config: BuildConfig, tmp_path: Path) -> None:
    script = tmp_path / "stalled_build.py"
    script.write_text(STALLED_BUILD)
    command = [sys.executable, script, config.bench, config.tokenizer, tmp_path / "corpus"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as building:
        assert building.stdout is not None
        assert building.stdout.readline() == b"stalled\n"
        children = psutil.Process(building.pid).children()
        assert len(children) >= 2
        building.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_output_built_from_something_else_is_refused(
    config: BuildConfig, corpus: Corpus, tmp_path: Path
) -> None:
    bench = write_bench(tmp_path / "bench", {"ALPHA__Sums__plus": ROWS["ALPHA__Sums__plus"][:5]})
    with pytest.raises(ValueError, match="holds a corpus built from .*remove it or choose another"):
        build(replace(config, bench=bench))
    with pytest.raises(ValueError, match="has no files of split 'test'; it has train"):
        build(replace(config, split="test"))


def test_a_bench_file_that_changed_is_refused(config: BuildConfig, tmp_path: Path) -> None:
    bench = write_bench(tmp_path / "bench", {"A__B__c": ROWS["ALPHA__Sums__plus"]})
    file = bench / "train" / "A__B__c.jsonl"
    # As many bytes and rows as before: only the digest can tell.
    file.write_bytes(file.read_bytes().replace(b"What is 3 ", b"What is 4 "))
    with pytest.raises(ValueError, match=r"A__B__c.jsonl was changed after the bench was built: SHA-256 "):
        build(replace(config, bench=bench, output=tmp_path / "a"))
    assert not (tmp_path / "a" / "train" / "shard-00000.bin").exists()


def test_row_count_and_malformed_rows(config: BuildConfig, tmp_path: Path) -> None:
    rows = ROWS["ALPHA__Sums__plus"]
    bench = write_bench(tmp_path / "bench", {"A__B__c": [*rows, {"id": "x", "src": "s"}]})
    with pytest.raises(ValueError, match=r"A__B__c.jsonl:41: got .* expected an object with src and tgt"):
        build(replace(config, bench=bench, output=tmp_path / "a"))
    bench = write_bench(tmp_path / "other", {"A__B__c": rows})
    manifest = bench / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"examples": 40', '"examples": 41'))
    with pytest.raises(ValueError, match="A__B__c.jsonl has 40 rows, the bench manifest says 41"):
        build(replace(config, bench=bench, output=tmp_path / "b"))


def test_jobs_share_the_shards_and_a_whole_run_finishes(config: BuildConfig, tmp_path: Path) -> None:
    sharded = replace(config, output=tmp_path / "alone", shard_examples=3)
    alone = build(sharded)
    assert len(alone.manifest["shards"]) == 3
    shared = replace(sharded, output=tmp_path / "shared")
    for index in (1, 0):
        share = build_corpus(
            replace(shared, job=Job(index, 2)), lambda examples: None, lambda examples, tokens: None
        )
        assert share is None
        assert not (shared.output / "train" / "manifest.json").exists()
    written = {path: path.stat().st_mtime_ns for path in (shared.output / "train").glob("*.bin")}
    assert len(written) == 3
    build(shared)
    assert digests(shared.output / "train") == digests(alone.folder)
    assert {path: path.stat().st_mtime_ns for path in written} == written, "the last run wrote no shard"


def test_two_runs_do_not_write_one_shard(config: BuildConfig, tmp_path: Path) -> None:
    with (
        claim(tmp_path / "train" / "shard-00000"),
        pytest.raises(ValueError, match="shard-00000 is being written by another process; wait for it"),
    ):
        build(replace(config, output=tmp_path))
    build(replace(config, output=tmp_path))


def test_a_tokenizer_trained_anew_in_one_folder_is_the_one_used(config: BuildConfig, tmp_path: Path) -> None:
    texts = [f"{row['src']} {row['tgt']}" for rows in ROWS.values() for row in rows]
    sums = []
    for number, repeated in enumerate(("What is", "Answer:")):
        train_byte_level_bpe([*texts, *[repeated] * 500], vocab_size=290, folder=tmp_path / "tokenizer")
        of_this = replace(config, tokenizer=tmp_path / "tokenizer", output=tmp_path / f"{number}")
        built = build(of_this)
        tokens, source_length = built.tokens(0, 0)
        assert Tokenizer.load(of_this.tokenizer).decode(tokens[:source_length]) == "What is 0 + 0?\nAnswer:"
        sums.append(built.manifest["shards"][0]["bin_sha256"])
    assert sums[0] != sums[1]
