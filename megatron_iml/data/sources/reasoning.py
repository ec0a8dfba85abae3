"""The reasoning data sets of OPT-IML in the files of their own repositories, one reader entry for each.

What enters: the folder of one data set, and which one it is. What leaves: its `Task`, in the form of
`reasoning_form`.

    {reader: reasoning, folder: strategyqa/data, options: {data_set: strategyqa}}
    {"question": "Do hamsters hunt?", "answer": false, "facts": ["Hamsters are prey."]}
    ->  source "Answer the following question by reasoning step by step.\\nDo hamsters hunt?"
        targets ("Hamsters are prey. The answer is no",)

With `grade_school_math` (GSM8K) and `flan_cot` (ECQA, QASC, QED, SenseMaking and others as FLAN has them)
these are the paper's fourteen. CoS-E, e-SNLI and WinoWhy keep what belongs together in several places: see
`reasoning_joined.py`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.sources.reasoning_form import (
    BENCHMARK,
    CATEGORY,
    MATH_INSTRUCTION,
    QUESTION_INSTRUCTION,
    reasoning_target,
)
from megatron_iml.data.sources.reasoning_joined import Solved, cos_e, e_snli, wino_why
from megatron_iml.data.tables import table_rows
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import json_object, source_files

Reader = Callable[[Path], Iterator[tuple[str, Solved]]]
# What a row that has not the fields of its format raises, whatever is wrong with it.
MALFORMED = (KeyError, IndexError, TypeError, AttributeError)


def read(folder: Path, drops: Drops, *, data_set: str = "") -> Iterator[Task]:
    """The task of one data set.

    Args:
        folder: the data set's repository or a folder inside it.
        drops: where instances are counted.
        data_set: one of `DATA_SETS`.

    Raises:
        ValueError: no such data set; nothing matches.
    """
    if data_set not in DATA_SETS:
        known = ", ".join(DATA_SETS)
        raise ValueError(f"reasoning: no data set {data_set!r}; give the option data_set: {known}")
    found = DATA_SETS[data_set]
    # AQuA's .tok.json repeat its rows with their words parted by blanks.
    paths = [path for path in source_files(folder, found.pattern, drops) if ".tok." not in path.name]
    pick = partial(_instances, paths, folder, found)
    yield make_task(drops, BENCHMARK, data_set, CATEGORY, pick, data_sources=(data_source(data_set),))


def _instances(paths: list[Path], folder: Path, data_set: "DataSet", counts: TaskCounts) -> Instances:
    for path in paths:
        # The path: MATH has a file for each problem, numbered anew in every folder.
        place = path.relative_to(folder).with_suffix("").as_posix()
        for id, solved in _solved(data_set.read, path):
            # Before a hyphen stands what several questions are about: a story whose next question quotes the
            # last one's answer, a theory whose proofs are one text.
            about = f"{place}-{id.partition('-')[0]}"
            yield f"{place}-{id}", _form(solved, data_set.instruction, about)


def _solved(read_file: Reader, path: Path) -> Iterator[tuple[str, Solved]]:
    # Readers of single rows count what is malformed; one that joins files or nests stories cannot go on.
    try:
        yield from read_file(path)
    except MALFORMED as error:
        raise ValueError(
            f"{path}: not in the format of its data set ({type(error).__name__}: {error}); "
            "fix or remove the file, or correct the option data_set"
        ) from error


def _form(solved: Solved, instruction: str, instance: str) -> Form | str:
    if isinstance(solved, str):
        return solved
    question, answer, rationales = solved
    texts = (question, answer, *rationales)
    if not rationales or not all(isinstance(text, str) and text.strip() for text in texts):
        return "no question, answer or reasoning"
    targets = tuple(reasoning_target(rationale, answer) for rationale in rationales)
    return Form(f"{instruction}\n{question.strip()}", targets, (), instruction, instance)


def _rows(solve: Callable[[dict[str, Any]], Solved], path: Path) -> Iterator[tuple[str, Solved]]:
    for number, row in table_rows(path):
        try:
            yield str(number), solve(row)
        except MALFORMED:
            yield str(number), "fields are missing or of another kind"


def _aqua(row: dict[str, Any]) -> Solved:
    return row["question"] + "\n" + "\n".join(row["options"]), row["correct"], (row["rationale"],)


def _strategy_qa(row: dict[str, Any]) -> Solved:
    # The official file has booleans, copies of it have texts.
    answer = "yes" if str(row["answer"]).lower() in ("true", "yes") else "no"
    return row["question"], answer, (" ".join(row["facts"]),)


def _creak(row: dict[str, Any]) -> Solved:
    question = f"Is the following sentence true or false?\n{row['sentence']}"
    return question, str(row["label"]).lower(), (row["explanation"],)


def _ecqa(row: dict[str, Any]) -> Solved:
    options = "\n".join(f"- {row[f'q_op{number}']}" for number in range(1, 6))
    # taskB is the explanation in whole sentences; taskA holds single properties.
    return f"{row['q_text']}\n{options}", row["q_ans"], (row["taskB"],)


def _qasc(row: dict[str, Any]) -> Solved:
    choices = row["question"]["choices"]
    options = "\n".join(f"({choice['label']}) {choice['text']}" for choice in choices)
    right = {choice["label"]: choice["text"] for choice in choices}[row["answerKey"]]
    return f"{row['question']['stem']}\n{options}", right, (f"{row['fact1']} {row['fact2']}",)


def _qed(row: dict[str, Any]) -> Solved:
    annotation = row["annotation"]
    answer = annotation["answer"][0]["paragraph_reference"]["string"]
    question = f"{row['paragraph_text']}\n{row['question_text']}"
    return question, answer, (annotation["selected_sentence"]["string"],)


def _proof_writer(path: Path) -> Iterator[tuple[str, Solved]]:
    """Theories with their questions (`meta-*.jsonl`), or a row for each question, as copies have it."""
    for number, row in table_rows(path):
        nested = row.get("questions")
        # Keyed Q1, Q2, ... in the official files.
        questions = nested if isinstance(nested, dict) else {"0": row}
        for name, asked in questions.items():
            try:
                question = f"{row['theory']}\nIs the following true, false or unknown? {asked['question']}"
                yield f"{number}-{name}", (question, str(asked["answer"]).lower(), (row["allProofs"],))
            except MALFORMED:
                yield f"{number}-{name}", "fields are missing or of another kind"


def _math(path: Path) -> Iterator[tuple[str, Solved]]:
    # A file for each problem; its folders say category and part, which are not needed.
    problem = json_object(path)
    try:
        answer = _boxed(problem["solution"])
        yield "0", (problem["problem"], answer, (problem["solution"],)) if answer else "no \\boxed answer"
    except MALFORMED:
        yield "0", "fields are missing or of another kind"


def _boxed(solution: str) -> str:
    r"""What the last \boxed{...} of a solution holds; braces nest in it."""
    # The last: earlier boxes hold intermediate results. MATH's own scorer takes \fbox as well.
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", solution))
    if not found:
        return ""
    depth, start = 1, found[-1].end()
    for position in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[position], 0)
        if depth == 0:
            return solution[start:position]
    return ""


def _coqa(path: Path) -> Iterator[tuple[str, Solved]]:
    for story_number, story in enumerate(json_object(path)["data"]):
        asked = ""
        if len(story["questions"]) != len(story["answers"]):
            yield f"{story_number}-0", "not as many answers as questions in the story"
            continue
        for question, answer in zip(story["questions"], story["answers"], strict=True):
            asked += f"\nQ: {question['input_text']}"
            solved = (f"{story['story']}{asked}", answer["input_text"], (answer["span_text"],))
            yield f"{story_number}-{question['turn_id']}", solved
            # The true answer and not the model's: the next question refers to it.
            asked += f"\nA: {answer['input_text']}"


class DataSet(NamedTuple):
    """Where a data set's files are, how one is read, and its instruction."""

    pattern: str
    read: Reader
    instruction: str = QUESTION_INSTRUCTION


# "[nv].json" are train.json and dev.json: beside them lie paragraphs, configs, and tests without answers.
DATA_SETS: Mapping[str, DataSet] = {
    "aqua": DataSet("**/*.json", partial(_rows, _aqua), MATH_INSTRUCTION),
    "coqa": DataSet("**/coqa-*.json", _coqa),
    "cos_e": DataSet("**/*_rand_split.jsonl", cos_e),
    "creak": DataSet("**/*[nv].json", partial(_rows, _creak)),
    "ecqa": DataSet("**/cqa_data*.csv", partial(_rows, _ecqa)),
    "e_snli": DataSet("**/*1.*", e_snli),
    "math": DataSet("**/*.json", _math, MATH_INSTRUCTION),
    "proofwriter": DataSet("**/*.jsonl", _proof_writer),
    "qasc": DataSet("**/*.jsonl", partial(_rows, _qasc)),
    "qed": DataSet("**/*.jsonlines", partial(_rows, _qed)),
    "strategyqa": DataSet("**/*[nv].json", partial(_rows, _strategy_qa)),
    "winowhy": DataSet("**/winowhy.json", wino_why),
}
