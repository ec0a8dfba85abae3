import pytest
from readers import Reading, write_files

from megatron_iml.data.sources.flan import load_patterns, read, straight

PATTERNS = """
# FLAN's file is a dictionary literal among other statements.
import os
PATTERNS = {
    "rte": [
        ("{premise}\\n\\nDoes it follow that {hypothesis}\\n{options_}", "{answer}"),
        ("Read: {premise}\\n{options_}" "\\nTrue? {hypothesis}", "{answer}"),
        ("Generate a context.", "Context: {premise}"),
    ],
    "arc": [("{question}", "{answer}"), ("{question}?", "{answer}"), ("Ask.", "{question}")],
}
"""


def reading(tmp_path, files, templates: object = PATTERNS, name: str = "templates.py", **options):
    write_files(tmp_path, {name: templates})
    return Reading(read, write_files(tmp_path / "rows", files), templates=f"../{name}", **options)


def test_templates_and_options(tmp_path):
    rows = [
        {"premise": "It rains.", "hypothesis": "it is wet.", "options": ["yes", "no"], "answer": "yes"}
    ] * 40
    found = reading(tmp_path, {"rte.jsonl": rows})
    task = found.tasks["rte"]
    assert (task.benchmark, task.category, task.metric, task.data_sources) == (
        "FLAN",
        "rte",
        "accuracy",
        ("rte",),
    )
    examples = found.examples("rte")
    assert {example.source for example in examples} == {
        "It rains.\n\nDoes it follow that it is wet.\nOPTIONS:\n- yes\n- no",
        "Read: It rains.\nOPTIONS:\n- yes\n- no\nTrue? it is wet.",
    }
    assert {(example.targets, example.candidates) for example in examples} == {(("yes",), ("yes", "no"))}
    again = reading(tmp_path, {"rte.jsonl": rows}).examples("rte")
    assert again == examples
    assert reading(tmp_path, {"rte.jsonl": rows}, seed=2).examples("rte") != examples


def test_label_numbers_become_flans_words(tmp_path):
    rows = [{"premise": "p", "hypothesis": "h", "label": label} for label in (0, 1, -1)]
    found = reading(tmp_path, {"rte/validation.jsonl": rows})
    assert [example.targets for example in found.examples("rte")] == [("yes",), ("no",)]
    assert found.counts("rte").dropped == {"no text for the field options_ of its template": 1}


def test_parts_of_a_task_share_its_templates(tmp_path):
    rows = [{"question": "q", "answer": "a"}]
    found = reading(tmp_path, {"arc_easy.jsonl": rows, "arc_challenge/train.csv": "question,answer\nq,a\n"})
    assert {name: task.category for name, task in found.tasks.items()} == {
        "arc_easy": "arc",
        "arc_challenge": "arc",
    }
    assert found.tasks["arc_easy"].metric == "rouge_l"
    assert found.examples("arc_challenge")[0].targets == ("a",)


def test_templates_that_turn_a_task_round_are_dropped(tmp_path):
    write_files(tmp_path, {"templates.py": PATTERNS, "templates.json": {"x": [["a {b}", "{c}"]]}})
    patterns = load_patterns(tmp_path / "templates.py")
    assert [pattern.target for pattern in straight(patterns["rte"])] == ["{answer}"] * 2
    assert load_patterns(tmp_path / "templates.json")["x"][0] == ("a {b}", "{c}")


def test_rows_without_a_field_are_dropped_by_its_name(tmp_path):
    rows = [
        {"question": " ", "answer": "a"},
        {"question": "q"},
        {"question": 5, "answer": True},
        {"question": "q", "answer": "a", "options": [None]},
    ]
    found = reading(tmp_path, {"arc.jsonl": rows})
    (example,) = found.examples("arc")
    assert (example.source.rstrip("?"), example.targets) == ("5", ("True",))
    assert found.counts("arc").dropped == {
        "no text for the field question of its template": 1,
        "no text for the field answer of its template": 1,
        "options are not texts": 1,
    }


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("PATTERNS = make()", "no literal PATTERNS"),
        ("X = {}", r"no literal PATTERNS .*no assignment to PATTERNS"),
        ("PATTERNS = {", "no literal PATTERNS"),
        ("PATTERNS = {'rte': [('a',)]}", "no literal PATTERNS"),
    ],
)
def test_templates_that_are_none(tmp_path, templates, message):
    with pytest.raises(ValueError, match=message):
        reading(tmp_path, {"rte.jsonl": [{}]}, templates)


def test_a_task_without_templates_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="FLAN has no templates of a task 'riddles'"):
        reading(tmp_path, {"riddles.jsonl": [{}]})
    with pytest.raises(FileNotFoundError, match="no templates .*absent"):
        Reading(read, tmp_path / "rows", templates="absent.py")
