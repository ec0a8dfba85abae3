import csv
from pathlib import Path

import pytest
import yaml

from megatron_iml.data.example import Example, Task
from megatron_iml.data.taxonomy.categories import TABLE, categorise, load_categories

DEVSET = Path(__file__).parents[3].parent / "shared" / "devset"


def task(name: str, benchmark: str, label: str) -> Task:
    def examples():
        yield Example("1", name, benchmark, label, "q", ("a",))

    return Task(name, benchmark, label, "rouge_l", examples)


def test_the_table_has_a_hundred_categories_and_every_one_of_super_natural_instructions():
    categories = load_categories()
    own = {category for category, labels in yaml.safe_load(TABLE.read_text()).items() if "NIV2" in labels}
    assert len(categories.names) >= 100
    # The 76 of the final release, each under its own name.
    assert len({name for name in own if categories.labels.get(("NIV2", name)) == name}) == 76


@pytest.mark.parametrize(
    ("name", "benchmark", "label", "category"),
    [
        ("task1_x", "NIV2", "Misc.", "Misc."),
        ("super_glue__copa", "PromptSource", "", "Cause Effect Classification"),
        ("super_glue__boolq", "PromptSource", "", "Question Answering"),
        ("race__high", "PromptSource", "", "Question Answering"),
        ("anli_r1", "FLAN", "anli", "Textual Entailment"),
        ("wmt16_enro", "T5", "Text_to_SQL", "Translation"),
        ("mine", "T5", "Text_to_SQL", "Text to SQL"),
        ("mine", "MyBench", "My own", "My own"),
    ],
)
def test_tasks_are_found_by_name_data_set_or_label(name, benchmark, label, category):
    (moved,) = categorise([task(name, benchmark, label)], load_categories())
    assert (moved.name, moved.category) == (name, category)
    assert next(moved.examples()).category == category


def test_a_task_without_category_is_an_error_that_names_it():
    tasks = [task("mine", "PromptSource", ""), task("race", "PromptSource", "")]
    with pytest.raises(ValueError, match="no category for 1 tasks, PromptSource: mine; write a file"):
        categorise(tasks, load_categories())


def test_a_users_table_adds_and_overrides(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("Riddles: {PromptSource: [mine, race]}\n")
    tasks = [task("mine", "PromptSource", ""), task("race", "PromptSource", "")]
    assert {each.category for each in categorise(tasks, load_categories(own))} == {"Riddles"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("A: {B: [x]}\nC: {B: [x]}", "B 'x' stands under 'A' and 'C'; keep one"),
        ("A: {B: [x, x]}", "B 'x' stands under 'A' and 'A'; keep one"),
        ("A: [x]", r"'A' has \['x'\]; give benchmarks with lists of labels"),
        ("A: {B: x}", "A: B has 'x'; give a list of labels"),
        ("A: {}", "'A' has {}; give benchmarks"),
    ],
)
def test_tables_are_read_strictly(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_categories(path)


@pytest.mark.skipif(not DEVSET.is_dir(), reason="needs the devset")
def test_every_task_of_flans_collection_has_a_category():
    with (DEVSET / "FLAN/flan/v2/flan_collection_info.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    categories = load_categories()
    orphans = {
        (row["Source"], row["Generic Task Category"])
        for row in rows
        # Inverted tasks are those that OPT-IML removed.
        if not row["Generic Task Category"].startswith("Inverted ")
        and ("NIV2" if row["Source"] == "NIv2" else "FLAN", row["Generic Task Category"])
        not in categories.labels
    }
    assert len(rows) == 1945
    assert not orphans


@pytest.mark.skipif(not DEVSET.is_dir(), reason="needs the devset")
def test_every_promptsource_data_set_of_the_devset_has_a_category():
    templates = DEVSET / "promptsource/promptsource/templates"
    names = [path.parent.relative_to(templates).as_posix() for path in templates.rglob("templates.yaml")]
    tasks = [task(name.replace("/", "__"), "PromptSource", "") for name in names]
    assert len(tasks) == 66
    categorise(tasks, load_categories())
