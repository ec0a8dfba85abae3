import json

import pytest

from megatron_iml.data.ledger import Drops
from megatron_iml.data.sources.super_natural_instructions import read

FINAL = {
    "Contributors": ["A"],
    "Source": ["capitals"],
    "URL": [float("nan")],
    "Categories": ["Misc."],
    "Definition": ["Name the capital."],
    "Positive Examples": [
        {"input": "Chad", "output": "N'Djamena", "explanation": "It is."},
        {"input": "Mali", "output": "Bamako", "explanation": "It is."},
    ],
    "Negative Examples": [],
    "Instances": [
        {"id": "task1-a", "input": "Togo ", "output": ["Lome", "Lomé"]},
        {"id": "task1-b", "input": "", "output": ["none"]},
    ],
    "Instance License": ["Unknown"],
}


def tasks_of(tmp_path, **files):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    drops = Drops(tmp_path)
    return {task.name: task for task in read(tmp_path, drops)}, drops


def test_final_schema(tmp_path):
    tasks, drops = tasks_of(tmp_path, task1_capitals=FINAL)
    task = tasks["task1_capitals"]
    assert (task.benchmark, task.category, task.metric) == ("NIV2", "Misc.", "rouge_l")
    first, second = task.examples()
    assert (first.id, first.task, first.category) == ("task1-a", "task1_capitals", "Misc.")
    assert first.source == "Instructions: Name the capital.\nInput: Togo"
    assert first.targets == ("Lome", "Lomé")
    assert first.candidates == ()
    assert second.source == "Instructions: Name the capital."
    assert drops.task("NIV2", "task1_capitals").read == 2


def test_pre_release_schema(tmp_path):
    content = {
        "Definition": "Name the capital.\n",
        "Categories": ["Classification -> Verification -> Entailment Verification", "Other"],
        "Instances": [{"input": "Togo", "output": ["Lome"]}, {"input": "Mali", "output": ["Bamako"]}],
    }
    tasks, _ = tasks_of(tmp_path, task2_old=content)
    assert tasks["task2_old"].category == "Entailment Verification"
    examples = list(tasks["task2_old"].examples())
    assert [example.id for example in examples] == ["task2_old-0", "task2_old-1"]
    assert examples[0].source == "Instructions: Name the capital.\nInput: Togo"


def test_derived_schema_with_plain_strings(tmp_path):
    content = {
        "Definition": ["Name the capital.", "Answer briefly."],
        "Categories": "Misc.",
        "Instances": [{"id": "x", "input": "Togo", "output": "Lome"}],
    }
    tasks, _ = tasks_of(tmp_path, task3_derived=content)
    (example,) = tasks["task3_derived"].examples()
    assert tasks["task3_derived"].category == "Misc."
    assert example.source == "Instructions: Name the capital.\nAnswer briefly.\nInput: Togo"
    assert example.targets == ("Lome",)


def test_first_version_subtasks(tmp_path):
    content = {
        "Title": "Capitals",
        "Prompt": "Write the capital.",
        "Definition": "Name the capital.",
        "Things to Avoid": "-",
        "Examples": {"Positive Examples": "-", "Negative Examples": "-"},
        "Instances": [{"input": "Togo", "output": ["Lome"]}],
    }
    tasks, _ = tasks_of(tmp_path, subtask004_capitals=content)
    task = tasks["subtask004_capitals"]
    assert task.category == "Uncategorised"
    assert next(task.examples()).source == "Instructions: Name the capital.\nInput: Togo"


def test_numbers_shared_by_two_files_do_not_clash(tmp_path):
    tasks, _ = tasks_of(tmp_path, task868_one=FINAL, task868_two=FINAL)
    assert sorted(tasks) == ["task868_one", "task868_two"]


def test_dirty_instances_are_converted_or_dropped_with_a_reason(tmp_path):
    instances = [
        {"id": "1", "input": "a", "output": [True, 2, 0.5]},
        {"id": "2", "input": "b"},
        {"id": "3", "input": None, "output": ["x"]},
        {"id": "4", "input": "d", "output": [None]},
        "not an object",
        {"id": 5, "input": "\ufeffe\u2028\x07", "output": ["\U0001f600"]},
    ]
    tasks, drops = tasks_of(tmp_path, task1_dirty={**FINAL, "Instances": instances})
    first, last = tasks["task1_dirty"].examples()
    assert first.targets == ("True", "2", "0.5")
    assert (last.id, last.targets) == ("5", ("\U0001f600",))
    assert last.source.endswith("Input: \ufeffe\u2028\x07")
    counts = drops.task("NIV2", "task1_dirty")
    assert counts.read == 6
    assert counts.dropped == {"no output": 2, "input or output is not text": 2}


def test_positive_examples_stand_between_definition_and_input(tmp_path):
    tasks_of(tmp_path, task1_capitals=FINAL)
    (task,) = read(tmp_path, Drops(), positive_examples=2)
    first, second = task.examples()
    shown = "Input: Chad\nOutput: N'Djamena\n\nInput: Mali\nOutput: Bamako"
    assert first.source == f"Instructions: Name the capital.\n\n{shown}\n\nInput: Togo"
    assert second.source.startswith(f"Instructions: Name the capital.\n\n{shown}\n\nInput:")


def test_first_version_nests_its_positive_examples(tmp_path):
    nested = {"Positive Examples": [{"input": "Chad", "output": "N'Djamena"}], "Negative Examples": "-"}
    content = {
        "Definition": "Name it.",
        "Examples": nested,
        "Instances": [{"input": "Togo", "output": "Lome"}],
    }
    tasks_of(tmp_path, subtask1=content)
    (task,) = read(tmp_path, Drops(), positive_examples=3)
    shown = "Input: Chad\nOutput: N'Djamena"
    assert next(task.examples()).source == f"Instructions: Name it.\n\n{shown}\n\nInput: Togo"


def test_a_positive_example_without_output_is_an_error(tmp_path):
    tasks_of(tmp_path, task1=FINAL | {"Positive Examples": [{"input": "Chad"}]})
    (task,) = read(tmp_path, Drops(), positive_examples=1)
    with pytest.raises(ValueError, match="task1.json: a positive example without input or output"):
        list(task.examples())


def test_zero_byte_files_are_recorded(tmp_path):
    tasks, drops = tasks_of(tmp_path, task1_capitals=FINAL, task2_empty="")
    assert list(tasks) == ["task1_capitals"]
    assert drops.skipped_files == {"tasks/task2_empty.json": "empty file"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"Definition": ["x"]}, "task1.json: no list `Instances`, so not a Super-NaturalInstructions task"),
        ('{"Definition": ', "task1.json: not valid JSON"),
        ([1], "task1.json: got a JSON list, expected an object"),
    ],
)
def test_a_file_that_is_no_task_is_an_error(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        tasks_of(tmp_path, task1=content)


def test_a_task_without_definition_is_an_error(tmp_path):
    tasks, _ = tasks_of(tmp_path, task1={"Definition": [""], "Instances": []})
    with pytest.raises(ValueError, match="task1.json: no `Definition`"):
        list(tasks["task1"].examples())


def test_data_sources_and_the_task_level_instruction(tmp_path):
    both = FINAL | {"Source": ["wsc; enhanced_wsc", "super_glue_x"]}
    tasks, _ = tasks_of(tmp_path, task1=both, task2=FINAL | {"Source": "bool_q"})
    assert tasks["task1"].data_sources == ("supergluex", "wsc")
    assert tasks["task2"].data_sources == ("boolq",)
    first = next(tasks["task1"].examples())
    assert first.instruction == "Instructions: Name the capital."
    assert first.source.startswith(first.instruction)


def test_task_lists_may_name_more_than_there_is(tmp_path):
    tasks_of(tmp_path, task1=FINAL, task2=FINAL)
    (tmp_path / "train.txt").write_text("task2\ntask7\n")
    (tmp_path / "other.txt").write_text("task8\n")
    drops = Drops(tmp_path)
    assert [task.name for task in read(tmp_path, drops, task_lists=["train.txt"])] == ["task2"]
    assert drops.skipped_files == {"train.txt": "names 1 of 2 tasks that are not in the folder"}
    with pytest.raises(ValueError, match="other.txt: names none of the 2 tasks in the folder"):
        list(read(tmp_path, drops, task_lists=["other.txt"]))
