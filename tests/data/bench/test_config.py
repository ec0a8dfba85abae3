import pytest

from megatron_iml.data.bench.config import load_bench_config
from megatron_iml.data.ledger import Drops


def write(tmp_path, config: str):
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "B__C__t.jsonl").write_text('{"src": "a", "tgt": "b"}\n')
    (tmp_path / "splits.yaml").write_text("test_examples_per_task: 3\n")
    path = tmp_path / "bench.yaml"
    path.write_text(config)
    return path


GOOD = "sources:\n- {reader: source_target, folder: data}\nsplits: splits.yaml\n"


def test_folders_lie_beside_the_config_or_below_another_root(tmp_path):
    path = write(tmp_path, GOOD)
    config = load_bench_config(path)
    assert [source.folder for source in config.sources] == [tmp_path / "data"]
    assert config.splits.test_examples_per_task == 3
    assert [task.name for task in config.tasks(Drops())] == ["t"]
    root = tmp_path / "elsewhere"
    (root / "data").mkdir(parents=True)
    assert load_bench_config(path, root).sources[0].folder == root / "data"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("sources: []\nsplits: splits.yaml", "sources must be a list of at least one reader"),
        ("splits: splits.yaml", r"got the keys \['splits'\], expected"),
        (
            GOOD.replace("source_target", "source_targets"),
            "no reader 'source_targets'; choose from source_target",
        ),
        (GOOD.replace("folder: data", "folder: data, shuffle: 1"), "a source is .*shuffle.*; give a reader"),
        (GOOD.replace("folder: data", "folder: 3"), "a source is .*; give a reader"),
        (GOOD.replace("folder: data", "options: {}"), "reader source_target needs a folder"),
        (GOOD.replace("source_target", "reasoning_gym"), "reader reasoning_gym takes no folder"),
        (
            GOOD.replace("data}", "data, options: {a: 1}}"),
            "reader source_target has no option 'a'; its options: none",
        ),
        (
            "sources: [{reader: reasoning_gym, options: {seed: x}}]\nsplits: splits.yaml",
            "reader reasoning_gym: option seed is 'x'; give int",
        ),
        (
            "sources: [{reader: reasoning_gym, options: {seed: true}}]\nsplits: splits.yaml",
            "reader reasoning_gym: option seed is True; give int",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_bench_config(write(tmp_path, config))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no source folder .*absent; correct it, give --source-root, or mark it"
    ):
        load_bench_config(write(tmp_path, GOOD.replace("folder: data", "folder: absent")))
    with pytest.raises(FileNotFoundError, match="no file .*other.yaml"):
        load_bench_config(write(tmp_path, GOOD.replace("splits.yaml", "other.yaml")))


def test_an_optional_source_that_is_not_there_is_recorded(tmp_path):
    both = GOOD.replace("splits:", "- {reader: flan_cot, folder: absent, optional: true}\nsplits:")
    config = load_bench_config(write(tmp_path, both))
    drops = Drops(config.root)
    assert [task.name for task in config.tasks(drops)] == ["t"]
    assert drops.skipped_files == {"absent": "optional source, folder not there"}
    only = GOOD.replace("folder: data", "folder: absent, optional: true")
    with pytest.raises(FileNotFoundError, match="no source folder is in .*; give the right --source-root"):
        load_bench_config(write(tmp_path, only))


def test_equal_names_below_two_folders_are_two_entries_of_the_ledger(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"B__C__{name}.jsonl").write_text('{"src": "a", "tgt": "b"}\n')
        (tmp_path / name / "B__C__empty.jsonl").write_text("")
    (tmp_path / "splits.yaml").write_text("seed: 1\n")
    sources = "".join(f"- {{reader: source_target, folder: {name}}}\n" for name in ("one", "two"))
    (tmp_path / "bench.yaml").write_text(f"sources:\n{sources}splits: splits.yaml\n")
    config = load_bench_config(tmp_path / "bench.yaml")
    drops = Drops(config.root)
    config.tasks(drops)
    assert sorted(drops.skipped_files) == ["one/B__C__empty.jsonl", "two/B__C__empty.jsonl"]


def test_a_table_of_ones_own_is_named_beside_the_splits(tmp_path):
    (tmp_path / "own.yaml").write_text("Riddles: {B: [t]}\n")
    config = load_bench_config(write(tmp_path, GOOD + "categories: own.yaml\n"))
    assert [task.category for task in config.tasks(Drops())] == ["Riddles"]


def test_only_new_leaves_out_data_sets_that_another_source_has(tmp_path):
    for name in ("codah", "cogs"):
        path = tmp_path / "crossfit" / f"{name}_16_13_dev.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("a\tb\n")
    (tmp_path / "exmix").mkdir()
    (tmp_path / "exmix" / "dev.tsv").write_text("a\tb\n")
    (tmp_path / "t0").mkdir()
    (tmp_path / "t0" / "codah_x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "splits.yaml").write_text("seed: 1\n")
    (tmp_path / "bench.yaml").write_text(
        "sources:\n- {reader: crossfit, folder: crossfit, only_new: true}\n"
        "- {reader: exmix, folder: exmix, options: {data_set: cogs}, only_new: true}\n"
        "- {reader: rendered_pairs, folder: t0}\nsplits: splits.yaml\n"
    )
    config = load_bench_config(tmp_path / "bench.yaml")
    drops = Drops(config.root)
    found = [(task.benchmark, task.name) for task in config.tasks(drops)]
    assert found == [("CrossFit", "cogs"), ("PromptSource", "codah")]
    assert drops.skipped_files == {
        "crossfit/codah": "only_new: another source has its data set",
        "exmix/cogs": "only_new: another source has its data set",
    }


def test_the_digest_of_inputs_changes_with_options_and_files(tmp_path):
    good = (
        "sources:\n- {reader: reasoning_gym, options: {seed: 1}}\n- {reader: source_target, folder: data}\n"
    )
    path = write(tmp_path, good + "splits: splits.yaml\n")
    first = load_bench_config(path).inputs_digest()
    assert load_bench_config(path).inputs_digest() == first
    path.write_text(path.read_text().replace("seed: 1", "seed: 2"))
    other = load_bench_config(path).inputs_digest()
    (tmp_path / "data" / "B__C__t.jsonl").write_text('{"src": "a", "tgt": "longer"}\n')
    assert len({first, other, load_bench_config(path).inputs_digest()}) == 3
