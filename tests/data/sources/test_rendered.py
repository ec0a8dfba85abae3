"""Prompts rendered by others: T0-style JSON Lines and ReCross."""

import pytest
from readers import Reading, write_files

from megatron_iml.data.sources import recross, rendered_pairs


def test_templates_of_a_data_set_are_one_task(tmp_path):
    write_files(
        tmp_path,
        {
            "qasc_is_correct_1.jsonl": [{"prompt": "Is rain wet?\n", "completion": "Yes<|endoftext|>"}],
            "qasc_qa_with_facts.jsonl": [{"prompt": "Wet?", "completion": "rain\n<|endoftext|> \n"}],
            "super_glue_boolq_exam.jsonl": [{"prompt": "Q?", "completion": "No<|endoftext|>"}],
            # Of squad_v2 and not of squad.
            "squad_v2_jeopardy.jsonl": [{"prompt": "A?", "completion": "B<|endoftext|>"}],
        },
    )
    found = Reading(rendered_pairs.read, tmp_path)
    assert list(found.tasks) == ["qasc", "squad_v2", "super_glue__boolq"]
    assert found.tasks["super_glue__boolq"].data_sources == ("boolq",)
    assert found.tasks["super_glue__boolq"].parent == "boolq"
    first, second = found.examples("qasc")
    assert (first.source, first.targets) == ("Is rain wet?", ("Yes",))
    assert second.targets == ("rain\n",)
    # The same line of two templates is one instance, which goes to one split.
    assert first.instance == second.instance == "1"


def test_consecutive_rows_of_one_prompt_are_references(tmp_path):
    rows = [("a", "1"), ("a", "2"), ("b", "3"), ("a", "4"), ("a", "4")]
    lines = [{"prompt": prompt, "completion": f"{text}<|endoftext|>"} for prompt, text in rows]
    found = Reading(rendered_pairs.read, write_files(tmp_path, {"qasc_x.jsonl": lines}))
    assert [(e.source, e.targets) for e in found.examples("qasc")] == [
        ("a", ("1", "2")),
        ("b", ("3",)),
        ("a", ("4", "4")),
    ]
    assert found.counts("qasc").dropped == {"one more reference of the row before": 2}


def test_other_names_of_the_fields_and_other_benchmarks(tmp_path):
    write_files(
        tmp_path,
        {
            "rte.jsonl": [
                {"inputs": "q", "targets": True, "task": "x"},
                {"input_text": "r", "output_text": None},
            ]
        },
    )
    found = Reading(rendered_pairs.read, tmp_path, benchmark="FLAN")
    (example,) = found.examples("rte")
    assert (example.benchmark, example.targets) == ("FLAN", ("True",))
    assert found.counts("rte").dropped == {"a field is not text": 1}


def test_rows_of_p3_have_ids_under_the_names_that_flan_has_texts_under(tmp_path):
    row = {"inputs": [3, 9], "targets": [7], "inputs_pretokenized": "Wet?", "targets_pretokenized": "Yes"}
    found = Reading(rendered_pairs.read, write_files(tmp_path, {"qasc_x.jsonl": [row]}))
    assert [(e.source, e.targets) for e in found.examples("qasc")] == [("Wet?", ("Yes",))]


def test_unknown_names_and_fields_are_errors(tmp_path):
    with pytest.raises(ValueError, match="nothing_1.jsonl: the name begins with no data set of PromptSource"):
        Reading(rendered_pairs.read, write_files(tmp_path / "a", {"nothing_1.jsonl": [{}]}))
    found = Reading(rendered_pairs.read, write_files(tmp_path / "b", {"qasc_1.jsonl": [{"prompt": "x"}]}))
    with pytest.raises(ValueError, match="qasc_1.jsonl:1: got the keys prompt; give prompt and completion"):
        found.examples("qasc")


def test_recross_records(tmp_path):
    records = [
        ["Wet? \n", ["Yes", "yes"], "super_glue-boolq|validation|exam|#7"],
        ["Is it wet?", ["Yes"], "super_glue-boolq|validation|a|b|#7"],
        ["x", ["y"]],
        ["x", [None], "super_glue-boolq|validation|exam|#8"],
    ]
    write_files(tmp_path, {"super_glue-boolq/test-1000.json": records, "split.json": {"T0": []}})
    found = Reading(recross.read, tmp_path)
    first, second = found.examples("super_glue__boolq")
    assert (first.source, first.targets, first.instance) == ("Wet?", ("Yes", "yes"), "validation|#7")
    assert second.instance == first.instance and second.id != first.id
    assert found.counts("super_glue__boolq").dropped == {
        "not [input, outputs, place]": 1,
        "a field is not text": 1,
    }


def test_recross_names_keep_the_hyphens_of_a_subset(tmp_path):
    # A byte order mark before an array is passed over, and not the array.
    marked = b'\xef\xbb\xbf[["q", ["a"], "x|y|z|#1"]]'
    write_files(tmp_path, {"ai2_arc-ARC-Easy/test-1000.json": marked, "bb/t.json": []})
    found = Reading(recross.read, tmp_path)
    assert list(found.tasks) == ["ai2_arc__ARC-Easy", "bb"]
    assert found.tasks["ai2_arc__ARC-Easy"].data_sources == ("ai2arc",)


def test_recross_files_that_are_no_arrays_are_recorded(tmp_path):
    line = [{"input_text": "q", "output_text": "a"}]
    write_files(tmp_path, {"bb/t.json": [["q", ["a"], "x|y|z|#1"]], "bb/downstream_test.jsonl": line})
    (tmp_path / "bb" / "downstream_test.jsonl").rename(tmp_path / "bb" / "downstream_test.json")
    found = Reading(recross.read, tmp_path)
    assert len(found.examples("bb")) == 1
    assert found.drops.skipped_files == {"bb/downstream_test.json": "not an array of records"}


TEMPLATES = """dataset: super_glue
subset: copa
templates:
  a: !Template
    answer_choices: null
    jinja: x ||| y
    name: C1 or C2?
    metadata: !TemplateMetadata {original_task: true}
  b: !Template
    answer_choices: null
    jinja: x ||| y
    name: Ask (why)
    metadata: !TemplateMetadata {original_task: false}
"""


def test_prompts_of_another_task_are_left_out_where_the_templates_say_so(tmp_path):
    row = [{"prompt": "x", "completion": "y"}]
    write_files(
        tmp_path,
        {
            "templates/super_glue/copa/templates.yaml": TEMPLATES,
            "t0/super_glue_copa_C1_or_C2_.jsonl": row,
            "t0/super_glue_copa_Ask_why_.jsonl": row,
            "recross/super_glue-copa/test-1000.json": [
                ["q", ["a"], "super_glue-copa|validation|C1 or C2?|#1"],
                ["q", ["a"], "super_glue-copa|validation|Ask (why)|#1"],
            ],
        },
    )
    found = Reading(rendered_pairs.read, tmp_path / "t0", templates="../templates")
    assert len(found.examples("super_glue__copa")) == 1
    assert found.drops.skipped_files == {"super_glue_copa_Ask_why_.jsonl": "template of another task"}
    found = Reading(recross.read, tmp_path / "recross", templates="../templates")
    assert len(found.examples("super_glue__copa")) == 1
    assert found.counts("super_glue__copa").dropped == {"template of another task": 1}
    assert len(Reading(recross.read, tmp_path / "recross").examples("super_glue__copa")) == 2
