"""Two builds of one output at once: the second one stops, says so and touches nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from corpora import ROWS, build, plan_of, write_bench
from readers import write_files

from megatron_iml.data.bench.demonstrations import Demonstrations, add_demonstrations
from megatron_iml.data.bench.folder import Bench
from megatron_iml.data.bench.splits import Splits
from megatron_iml.data.bench.writer import build_bench
from megatron_iml.data.contamination.search import Search, find_contamination
from megatron_iml.data.corpus.build import BuildConfig
from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.jobs import Job, claim
from megatron_iml.data.ledger import Drops
from megatron_iml.data.plan.mixture import Mixture
from megatron_iml.data.plan.packing import PackingConfig
from megatron_iml.data.sources.source_target import read

PACKING = PackingConfig(Mixture(50), row_length=64, rows=None, seed=1)


@pytest.fixture
def builds(config: BuildConfig, corpus: Corpus, tmp_path: Path) -> dict[str, Callable[[Path], object]]:
    """By name: what is built at a path."""
    rows = [{"src": f"What is {i}, {i} and {i}?", "tgt": f"{i}"} for i in range(40)]
    sources = write_files(tmp_path / "sources", {"A__B__c.jsonl": rows})
    test = write_bench(tmp_path / "test", {"A__B__c": ROWS["ALPHA__Sums__plus"]}, "test")

    def bench(output: Path, **options: object) -> Bench | None:
        drops = Drops(sources)
        return build_bench(list(read(sources, drops)), drops, Splits(), output, **options)

    def findings(output: Path) -> object:
        bench(tmp_path / "searched", overwrite=True)
        search = Search(tmp_path / "searched", output, ngram=3, workers=1)
        return find_contamination(search, lambda _: None, lambda _: None)

    return {
        "bench": bench,
        "a job's share of a bench": lambda output: bench(output, inputs="x", job=Job(0, 2)),
        "demonstrations": lambda output: add_demonstrations(
            Bench.open(test), Demonstrations(shots=1), output, ("test",)
        ),
        "corpus": lambda output: build(replace(config, output=output.parent, split="train")),
        "plan": lambda output: plan_of(corpus, PACKING, output),
        "findings": findings,
    }


@pytest.mark.parametrize(
    "name", ["bench", "a job's share of a bench", "demonstrations", "corpus", "plan", "findings"]
)
def test_the_second_of_two_builds_stops(
    name: str, builds: dict[str, Callable[[Path], object]], tmp_path: Path
) -> None:
    output = tmp_path / "out" / "train"
    partial = output.with_name(".train.partial")
    write_files(partial, {"work of the first": "x"})
    with (
        claim(output),
        pytest.raises(ValueError, match="out/train is being written by another process; wait for it to end"),
    ):
        builds[name](output)
    assert (partial / "work of the first").read_text() == "x"
    assert not output.exists() or not any(output.iterdir())
    builds[name](output)
    assert name == "a job's share of a bench" or any(output.iterdir())
    assert not list(output.parent.glob(".*.lock"))
