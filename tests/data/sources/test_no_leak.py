"""No instance is in train and in evaluation, whatever a reader makes of it: two prompts, turns or copies.

Every file below holds the instances item0, item1, ... more than once, each time in other words or with the
answer of the time before, as its format allows. After a build no word `item<n>` may be on both sides.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from readers import write_files

from megatron_iml.data.bench.folder import Bench
from megatron_iml.data.bench.splits import Splits
from megatron_iml.data.bench.writer import build_bench
from megatron_iml.data.ledger import Drops
from megatron_iml.data.sources.registry import READERS

COUNT = 60
ITEMS = range(COUNT)
TEMPLATE = """
  {0}: !Template
    answer_choices: null
    id: {0}
    jinja: "{0}? {{{{q}}}} ||| {{{{a}}}}"
    metadata: !TemplateMetadata {{metrics: [], original_task: true}}
    name: {0}
    reference: ''
"""
TEMPLATES = "dataset: x\ntemplates:" + TEMPLATE.format("a") + TEMPLATE.format("b")
ROWS = [{"idx": copy * COUNT + n, "q": f"item{n} ?", "a": "yes"} for copy in range(2) for n in ITEMS]
CROSSFIT = "".join(f"item{n}\tyes\n" for n in ITEMS)
STORY = {
    "questions": [{"input_text": f"ask {turn}", "turn_id": turn} for turn in (1, 2, 3)],
    "answers": [{"input_text": f"told {turn}", "span_text": "as told"} for turn in (1, 2, 3)],
}
TURNS = ("second || item{} first", "third || second || item{} first", "item{} first")
Case = tuple[str, str, Mapping[str, object], dict[str, object]]
CASES: Mapping[str, Case] = {
    "copies of a row meet other templates": (
        "promptsource",
        "rows",
        {"templates/x/templates.yaml": TEMPLATES, "rows/x/train.jsonl": ROWS},
        {"templates": "../templates"},
    ),
    "all templates of a row": (
        "promptsource",
        "rows",
        {"templates/x/templates.yaml": TEMPLATES, "rows/x/train.jsonl": ROWS[:COUNT]},
        {"templates": "../templates", "prompts_per_row": 0},
    ),
    "copies of a row in two files": (
        "flan",
        "rows",
        {
            "templates.json": {"x": [["One? {q}", "{a}"], ["Two? {q}", "{a}"]]},
            "rows/x/train.jsonl": ROWS[:COUNT],
            "rows/x/validation.jsonl": ROWS[COUNT:],
        },
        {"templates": "../templates.json"},
    ),
    "a file for each template": (
        "rendered_pairs",
        ".",
        {
            f"piqa_{name}.jsonl": [{"prompt": f"{name}? item{n}", "completion": "yes"} for n in ITEMS]
            for name in ("one", "two")
        },
        {},
    ),
    "a record for each template": (
        "recross",
        ".",
        {
            "piqa/a.json": [
                [f"{name}? item{n}", ["yes"], f"piqa|train|{name}|#{n}"] for n in ITEMS for name in "ab"
            ]
        },
        {},
    ),
    "draws that share rows": (
        "crossfit",
        ".",
        {
            "codah/codah_16_13_train.tsv": CROSSFIT,
            "codah/codah_16_13_test.tsv": CROSSFIT.replace("yes", "no"),
        },
        {},
    ),
    "turns that quote the answers before them": (
        "reasoning",
        ".",
        {"coqa-train.json": {"data": [{"story": f"item{n}", **STORY} for n in ITEMS]}},
        {"data_set": "coqa"},
    ),
    "questions about one theory": (
        "reasoning",
        ".",
        {
            "meta-train.jsonl": [
                {
                    "theory": f"item{n}",
                    "allProofs": "so",
                    "questions": {f"Q{q}": {"question": f"is it {q}?", "answer": True} for q in (1, 2)},
                }
                for n in ITEMS
            ]
        },
        {"data_set": "proofwriter"},
    ),
    "turns of a conversation": (
        "unified_skg",
        ".",
        {
            "sparc_train.jsonl": [
                {"text_in": turn.format(n), "struct_in": "t", "seq_out": "s"} for n in ITEMS for turn in TURNS
            ]
        },
        {},
    ),
    "several inputs of one instruction": (
        "instruction_rows",
        ".",
        {
            "tasks.jsonl": [
                {"instruction": f"item{n}", "instances": [{"input": str(i), "output": "o"} for i in (1, 2)]}
                for n in ITEMS
            ]
        },
        {},
    ),
    "pieces of one text": (
        "pretraining_text",
        ".",
        {"a.jsonl": [{"text": "\n\n".join(f"item{n} part {part}" for part in (1, 2, 3))} for n in ITEMS]},
        {"piece_characters": 20},
    ),
    "a dialogue twice": (
        "dialogues",
        ".",
        {f"{name}.jsonl": [{"dialog": [f"item{n}", "yes"]} for n in ITEMS] for name in "ab"},
        {},
    ),
    "solutions of one question": (
        "flan_cot",
        ".",
        {"x_train.tsv": "".join(f"item{n}\tyes\tbecause {why}\n" for n in ITEMS for why in (1, 2))},
        {},
    ),
    "an input with two outputs": (
        "super_natural_instructions",
        ".",
        {
            "task1_x.json": {
                "Definition": ["Say."],
                "Categories": ["Misc."],
                "Instances": [{"input": f"item{n}", "output": [out]} for n in ITEMS for out in ("a", "b")],
            }
        },
        {},
    ),
    "a question asked twice": (
        "source_target",
        ".",
        {"A__B__c.jsonl": [{"src": f"item{n} ", "tgt": tgt} for tgt in ("yes", "no") for n in ITEMS]},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_no_instance_is_on_both_sides(name: str, tmp_path) -> None:
    reader, place, files, options = CASES[name]
    folder = write_files(tmp_path / "in", files) / place
    read: Callable = READERS[reader]
    drops = Drops(folder)
    tasks = [replace(task, category="C") for task in read(folder, drops, **options)]
    # A third of every task is evaluated, so that what is not kept together is torn apart.
    splits = Splits(validation_examples_per_task=10, test_examples_per_task=14)
    bench = build_bench(tasks, drops, splits, tmp_path / "bench")
    assert isinstance(bench, Bench)
    items = {
        split: {
            item
            for entry in bench.files(split)
            for row in bench.rows(entry)
            for item in re.findall(r"item\d+", row["src"] + row["tgt"])
        }
        for split in ("train", "validation", "test")
    }
    assert not items["train"] & (items["validation"] | items["test"])
    assert len(items["train"]) > COUNT // 2
    assert len(items["validation"] | items["test"]) >= 4
