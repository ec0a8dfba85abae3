import pytest

from megatron_iml.data.ledger import Drops
from megatron_iml.data.sources.source_target import read


def tasks_of(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    drops = Drops()
    return list(read(folder, drops)), drops


def test_rows_become_examples(tmp_path):
    (task,), drops = tasks_of(
        tmp_path,
        T5__Translation__wmt16__enro=b'{"src": "Hi? A:", "tgt": "Salut", "references": ["Salut", "Bun"],'
        b' "id": 7}\n'
        b'{"src": "", "tgt": "A whole page."}\n',
    )
    assert (task.benchmark, task.category, task.name) == ("T5", "Translation", "wmt16__enro")
    assert task.metric == "rouge_l"
    first, second = task.examples()
    assert (first.id, first.source, first.targets) == ("7", "Hi? A:", ("Salut", "Salut", "Bun"))
    assert (second.id, second.source, second.targets) == ("1", "", ("A whole page.",))
    assert drops.task("T5", "wmt16__enro").read == 2


def test_candidates_make_the_task_one_of_accuracy(tmp_path):
    (task,), _ = tasks_of(tmp_path, B__C__t=b'{"src": "Is it?", "tgt": "Yes", "candidates": ["Yes", "No"]}\n')
    assert task.metric == "accuracy"
    assert next(task.examples()).candidates == ("Yes", "No")


def test_shards_of_a_name_are_one_task(tmp_path):
    for shard, word in (("00", b"first"), ("01", b"second")):
        (tmp_path / shard).mkdir()
        (tmp_path / shard / "B__C__t.jsonl").write_bytes(b'{"src": "' + word + b'", "tgt": "x"}\n')
    (task,) = read(tmp_path, Drops())
    assert [(example.id, example.source) for example in task.examples()] == [("0", "first"), ("1", "second")]


def test_scalars_are_converted_and_the_rest_dropped(tmp_path):
    (task,), drops = tasks_of(
        tmp_path, B__C__t=b'{"src": "a", "tgt": true}\n{"src": 5, "tgt": 0.5}\n{"src": "b", "tgt": null}\n'
    )
    assert [(example.source, example.targets[0]) for example in task.examples()] == [
        ("a", "True"),
        ("5", "0.5"),
    ]
    assert drops.task("B", "t").dropped == {"a field is not text": 1}
    assert drops.task("B", "t").read == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"src": "a"}', "B__C__t.jsonl:2: no `tgt`; got the keys src"),
        (b'{"tgt": "a"}', "B__C__t.jsonl:2: no `src`; got the keys tgt"),
        (b'{"src": "\xe9"}', "B__C__t.jsonl:2: not UTF-8"),
    ],
)
def test_malformed_lines_name_their_place(tmp_path, line, message):
    (task,), _ = tasks_of(tmp_path, B__C__t=b'{"src": "a", "tgt": "b"}\n' + line)
    with pytest.raises(ValueError, match=message):
        list(task.examples())


def test_a_name_of_two_parts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected a name <benchmark>__<category>__<task>.jsonl"):
        tasks_of(tmp_path, B__t=b'{"src": "a", "tgt": "b"}\n')
