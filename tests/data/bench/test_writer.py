import hashlib
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest

from megatron_iml.data.bench.config import load_bench_config
from megatron_iml.data.bench.folder import Bench, verify_bench
from megatron_iml.data.bench.splits import Splits
from megatron_iml.data.bench.staging import unfinished_folder
from megatron_iml.data.bench.writer import build_bench, render_row
from megatron_iml.data.example import Example, Metric, Task
from megatron_iml.data.jobs import Job
from megatron_iml.data.ledger import Drops, TaskCounts

SPLITS = Splits(
    held_out_categories=("Cause Effect",),
    held_out_tasks=("held__out",),
    validation_examples_per_task=4,
    test_examples_per_task=6,
)


def make_task(drops: Drops, name: str, category: str, count: int = 100, lose: int = 0) -> Task:
    """A task of `count` examples; its reader forgets to account for `lose` more."""

    def examples():
        counts = drops.task("B", name)
        counts.read += lose
        for index in range(count):
            counts.read += 1
            yield Example(
                f"{name}-{index}", name, "B", category, f"{name} question {index}?", (f" answer {index} ",)
            )

    return Task(name, "B", category, "rouge_l", examples)


def build(output: Path, splits: Splits = SPLITS, **options) -> Bench:
    drops = Drops()
    tasks = [
        make_task(drops, "cause", "Cause Effect"),
        make_task(drops, "held__out", "Question Answering"),
        make_task(drops, "trained/on", "Question Answering"),
        make_task(drops, "small", "Misc.", count=3),
    ]
    return build_bench(tasks, drops, splits, output, **options)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def row_of(
    targets: Sequence[str], candidates: Sequence[str] = (), source: str = "Is it?", metric: Metric = "rouge_l"
):
    counts = TaskCounts()
    example = Example("1", "t", "B", "C", source, tuple(targets), tuple(candidates))
    return render_row(example, metric, 1, counts), counts


@pytest.mark.parametrize("candidates", [[], ["yes"], ["yes", "yes "]])
def test_a_row_without_a_choice_is_no_row_of_a_ranked_task(candidates):
    row, counts = row_of(["yes"], candidates, metric="accuracy")
    assert row is None
    assert counts.dropped["fewer than two candidates in a task scored by accuracy"] == 1
    assert row_of(["yes"])[0] is not None
    assert row_of(["yes"], ["yes", "no"], metric="accuracy")[0] is not None


def test_a_task_of_two_categories_is_refused(tmp_path):
    tasks = [Task("t", "B", category, "rouge_l", lambda: iter(())) for category in ("C", "D")]
    with pytest.raises(ValueError, match="task 't' of B has the categories 'C' and 'D'"):
        build_bench(tasks, Drops(), Splits(), tmp_path / "bench")


def test_files_levels_and_counts(tmp_path):
    bench = build(tmp_path / "bench")
    found = {(entry.file, entry.level, entry.examples) for entry in bench.entries}
    assert found == {
        ("validation/B__Cause_Effect__cause.jsonl", "fully_held_out", 4),
        ("test/B__Cause_Effect__cause.jsonl", "fully_held_out", 6),
        ("validation/B__Question_Answering__held__out.jsonl", "partially_supervised", 4),
        ("test/B__Question_Answering__held__out.jsonl", "partially_supervised", 6),
        ("train/B__Question_Answering__trained_on.jsonl", "fully_supervised", 90),
        ("validation/B__Question_Answering__trained_on.jsonl", "fully_supervised", 4),
        ("test/B__Question_Answering__trained_on.jsonl", "fully_supervised", 6),
        ("train/B__Misc.__small.jsonl", "fully_supervised", 3),
    }
    on_disk = {path.relative_to(tmp_path / "bench").as_posix() for path in (tmp_path / "bench").glob("*/*")}
    assert on_disk == {file for file, _, _ in found}
    assert {entry.category for entry in bench.entries} == {"Cause Effect", "Question Answering", "Misc."}
    assert Path(bench.entries[2].file).stem.split("__", 2) == ["B", "Question_Answering", "held__out"]


def test_rows_are_the_examples_with_a_delimiter(tmp_path):
    bench = build(tmp_path / "bench")
    (entry,) = [entry for entry in bench.entries if entry.task == "small"]
    rows = list(bench.rows(entry))
    assert [row["id"] for row in rows] == ["small-0", "small-1", "small-2"]
    assert [row["tgt"] for row in rows] == ["answer 0", "answer 1", "answer 2"]
    assert all(row["src"].startswith("small question ") and row["src"].endswith(":") for row in rows)


def test_nothing_held_out_is_trained_on(tmp_path):
    bench = build(tmp_path / "bench")
    rows = {
        split: [row for entry in bench.files(split) for row in bench.rows(entry)]
        for split in ("train", "test")
    }
    train_ids = {row["id"] for row in rows["train"]}
    assert train_ids
    assert not [id for id in train_ids if id.startswith(("cause", "held__out"))]
    for split in ("validation", "test"):
        held_out = {row["id"] for entry in bench.files(split) for row in bench.rows(entry)}
        assert len(held_out) == sum(entry.examples for entry in bench.files(split))
        assert not train_ids & held_out


def test_a_training_row_that_repeats_a_held_out_source_is_dropped(tmp_path):
    drops = Drops()
    counts = drops.task("B", "twice")

    def examples():
        for index in range(100):
            counts.read += 1
            yield Example(str(index), "twice", "B", "C", f"question {index % 50}?", (f"answer {index}",))

    bench = build_bench(
        [Task("twice", "B", "C", "rouge_l", examples)], drops, Splits(seed=5), tmp_path / "bench"
    )
    sources = {}
    for split in ("train", "validation", "test"):
        (entry,) = bench.files(split)
        sources[split] = {row["src"].split("?")[0] for row in bench.rows(entry)}
    assert not sources["train"] & (sources["validation"] | sources["test"])
    leaks = counts.dropped["same source as a held-out instance"]
    assert leaks > 0
    assert counts.written.total() == 100 - leaks


def test_pretraining_text_is_not_taken_for_one_repeated_source(tmp_path):
    drops = Drops()

    def examples():
        for index in range(50):
            drops.task("B", "text").read += 1
            yield Example(str(index), "text", "B", "C", "", (f"page {index}",))

    bench = build_bench([Task("text", "B", "C", "rouge_l", examples)], drops, Splits(), tmp_path / "bench")
    assert sum(entry.examples for entry in bench.entries) == 50
    assert {row["src"] for row in bench.rows(bench.entries[0])} == {""}


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path):
    first = bytes_of(build(tmp_path / "one").folder)
    assert bytes_of(build(tmp_path / "two").folder) == first
    other = bytes_of(build(tmp_path / "three", Splits(**{**vars(SPLITS), "seed": 2})).folder)
    name = "test/B__Cause_Effect__cause.jsonl"
    assert other[name] != first[name]


def test_ledger_closes_and_is_complete(tmp_path):
    bench = build(tmp_path / "bench")
    tasks = bench.ledger()["tasks"]
    assert tasks["B__Cause_Effect__cause"] == {
        "read": 100,
        "written": {"test": 6, "validation": 4},
        "dropped": {"held-out task, beyond the evaluation counts": 90},
        "repaired": {},
    }
    assert set(tasks) == {entry.stem for entry in bench.entries}


def test_a_reader_that_loses_an_instance_stops_the_build_and_leaves_nothing(tmp_path):
    drops = Drops()
    with pytest.raises(
        AssertionError, match="ledger of B__C__t does not close: read 11, written 10, dropped 0"
    ):
        build_bench(
            [make_task(drops, "t", "C", count=10, lose=1)],
            drops,
            Splits(test_examples_per_task=0, validation_examples_per_task=0),
            tmp_path / "bench",
        )
    assert list(tmp_path.iterdir()) == []


def test_checksums_are_of_the_files(tmp_path):
    bench = build(tmp_path / "bench")
    for entry in bench.entries:
        assert entry.sha256 == hashlib.sha256(bench.path(entry).read_bytes()).hexdigest()
    manifest = orjson.loads((bench.folder / "manifest.json").read_bytes())
    assert (manifest["format_version"], manifest["seed"]) == (2, 1)
    assert manifest["splits"]["held_out_tasks"] == ["held__out"]


def test_output_is_replaced_only_if_asked_and_only_if_a_bench(tmp_path):
    build(tmp_path / "bench")
    with pytest.raises(ValueError, match="holds a bench already; give another --output, or --overwrite"):
        build(tmp_path / "bench")
    stray = tmp_path / "bench" / "train" / "stray.jsonl"
    stray.write_text("{}")
    verify_bench(build(tmp_path / "bench", overwrite=True).folder)
    assert not stray.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something that is not a bench and is never replaced"):
        build(other, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench", "other"]


def test_tasks_that_share_a_file_are_an_error(tmp_path):
    drops = Drops()
    tasks = [make_task(drops, "a/b", "C"), make_task(drops, "a b", "C")]
    with pytest.raises(ValueError, match=r"two tasks would be written to B__C__a_b.jsonl: 'a/b' and 'a b'"):
        build_bench(tasks, drops, Splits(), tmp_path / "bench")


def test_no_task_is_an_error_that_names_the_skipped_files(tmp_path):
    drops = Drops()
    drops.skip_file(Path("task1.json"), "empty file")
    with pytest.raises(ValueError, match="the sources hold no task; skipped files: task1.json"):
        build_bench([], drops, Splits(), tmp_path / "bench")


def test_references_are_cleaned_and_distinct():
    row, counts = row_of([" Yes", "yes ", "Yes", "", " \n"])
    assert row is not None
    assert (row["tgt"], row["references"]) == ("Yes", ["Yes", "yes"])
    assert counts.repaired == {"blank or repeated reference removed": 3}
    single, _ = row_of(["Yes"])
    assert single is not None and set(single) == {"id", "src", "tgt"}


def test_rows_without_a_usable_target_are_dropped_with_a_reason():
    for targets, candidates, reason in (
        ([" "], [], "blank target"),
        ([], [], "blank target"),
        (["Maybe"], ["Yes", "No"], "target is not among the candidates"),
    ):
        row, counts = row_of(targets, candidates)
        assert row is None
        assert counts.dropped == {reason: 1}
    row, _ = row_of([" Yes "], ["Yes", " No"])
    assert row is not None and row["candidates"] == ["Yes", "No"]


def write_sources(folder: Path, tasks: int = 3) -> Path:
    """A config of `tasks` small tasks in the form of src and tgt."""
    (folder / "sources").mkdir(parents=True)
    for number in range(tasks):
        rows = [{"src": f"{number} and {i}?", "tgt": f"answer {i}", "id": f"{i % 38}"} for i in range(40)]
        data = b"".join(orjson.dumps(row) + b"\n" for row in rows)
        (folder / "sources" / f"B__Words__t{number}.jsonl").write_bytes(data)
    (folder / "splits.yaml").write_text("validation_examples_per_task: 2\ntest_examples_per_task: 3\n")
    config = folder / "bench.yaml"
    config.write_text("sources: [{reader: source_target, folder: sources}]\nsplits: splits.yaml\n")
    return config


def build_from(path: Path, output: Path, **options) -> Bench | None:
    config = load_bench_config(path)
    drops = Drops(config.root)
    tasks = config.tasks(drops)
    inputs = config.inputs_digest()
    return build_bench(tasks, drops, config.splits, output, inputs=inputs, **options)


def test_bytes_do_not_depend_on_workers_or_jobs(tmp_path):
    config = write_sources(tmp_path)
    alone = build_from(config, tmp_path / "alone")
    assert alone is not None
    build_from(config, tmp_path / "workers", workers=2)
    assert bytes_of(tmp_path / "workers") == bytes_of(alone.folder)
    for index in (1, 0):
        assert build_from(config, tmp_path / "jobs", job=Job(index, 2)) is None
        assert not (tmp_path / "jobs").exists()
    records = unfinished_folder(tmp_path / "jobs") / "records"
    assert sorted(path.name for path in records.iterdir()) == [f"B__Words__t{i}.json" for i in range(3)]
    build_from(config, tmp_path / "jobs")
    assert bytes_of(tmp_path / "jobs") == bytes_of(alone.folder)
    assert not unfinished_folder(tmp_path / "jobs").exists()


def test_a_killed_build_keeps_its_tasks_but_no_stale_ones(tmp_path):
    config = write_sources(tmp_path)
    output = tmp_path / "bench"

    class Killed(Exception):
        pass

    def die():
        raise Killed

    with pytest.raises(Killed):
        build_from(config, output, on_task=die)
    kept = unfinished_folder(output) / "bench" / "train" / "B__Words__t0.jsonl"
    written = kept.stat().st_mtime_ns
    assert not output.exists()
    build_from(config, output)
    assert (output / "train" / "B__Words__t0.jsonl").stat().st_mtime_ns == written

    # Another source in between: its leftovers may be neither taken up nor left lying in the new bench.
    with pytest.raises(Killed):
        build_from(config, output, on_task=die, overwrite=True)
    (tmp_path / "sources" / "B__Words__t0.jsonl").rename(tmp_path / "sources" / "B__Words__u0.jsonl")
    bench = build_from(config, output, overwrite=True)
    assert bench is not None and "B__Words__t0" not in bench.ledger()["tasks"]
    verify_bench(output)


def test_a_task_whose_file_is_gone_or_cut_is_written_again(tmp_path):
    config = write_sources(tmp_path)
    build_from(config, tmp_path / "jobs", job=Job(0, 2))
    cut = unfinished_folder(tmp_path / "jobs") / "bench" / "train" / "B__Words__t0.jsonl"
    cut.write_bytes(cut.read_bytes()[:-5])
    build_from(config, tmp_path / "jobs")
    verify_bench(tmp_path / "jobs")


def test_rows_with_an_id_that_was_there_before_stay_and_are_counted(tmp_path):
    bench = build_from(write_sources(tmp_path, tasks=1), tmp_path / "bench")
    assert bench is not None
    account = bench.ledger()["tasks"]["B__Words__t0"]
    assert account["repaired"] == {"row kept whose id was there before": 2}
    assert sum(account["written"].values()) + sum(account["dropped"].values()) == 40
