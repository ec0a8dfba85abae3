"""Reasoning data sets whose questions and explanations have to be put together first.

What enters: the file of questions; what belongs to it lies beside it. What leaves: (id, solved) pairs, with
a question, an answer and its rationales, or the reason why there are none.

    CoS-E   dev_rand_split.jsonl + cose_dev*.jsonl          joined on `id`
    e-SNLI  s1.dev + s2.dev + labels.dev + *expl_1.dev      joined by line
    WinoWhy the reasons that people judged valid            several rationales of one answer
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_iml.data.text_files import json_lines, json_value, text_lines

# Question, answer and rationales; or the reason why there are none.
Solved = tuple[str, str, tuple[str, ...]] | str


def cos_e(path: Path) -> Iterator[tuple[str, Solved]]:
    """CommonsenseQA's questions with the explanations of CoS-E, `cose_<part>*.jsonl` in the same folder."""
    part = path.name.removesuffix("_rand_split.jsonl")
    files = sorted(path.parent.glob(f"cose_{part}*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{path} has no explanations cose_{part}*.jsonl beside it")
    # All of them in memory: 10,000 sentences.
    explanations = {
        row["id"]: row["explanation"]["open-ended"] for file in files for _, row in json_lines(file)
    }
    for number, row in json_lines(path):
        question, explanation = row.get("question"), explanations.get(row.get("id"))
        if explanation is None or not isinstance(question, dict):
            yield str(number), "no explanation of that id"
            continue
        # Test questions have no answerKey: their answer is empty, which the caller counts.
        choices = {choice["label"]: choice["text"] for choice in question["choices"]}
        options = "\n".join(f"({label}) {text}" for label, text in choices.items())
        yield (
            str(number),
            (f"{question['stem']}\n{options}", choices.get(row.get("answerKey"), ""), (explanation,)),
        )


def e_snli(path: Path) -> Iterator[tuple[str, Solved]]:
    """`s1.<part>` and its parallel files; other files that match the pattern are theirs and yield nothing."""
    if path.stem != "s1":
        return
    part = path.suffix
    explained = sorted(path.parent.glob(f"*expl_1{part}"))
    if not explained:
        raise FileNotFoundError(f"{path} has no explanations *expl_1{part} beside it")
    # Three people explained each pair of dev and test, one each of train: the first of each is taken.
    files = [path, path.with_name(f"s2{part}"), path.with_name(f"labels{part}"), explained[0]]
    # strict: a file that ends early has lost a line, and every pair after it would be wrong.
    lines = zip(*(text_lines(file) for file in files), strict=True)
    try:
        for (number, premise), (_, hypothesis), (_, label), (_, reason) in lines:
            question = (
                f"Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise entail the hypothesis?"
            )
            yield str(number), (question, label, (reason,))
    except ValueError as error:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path.parent}: {names} do not go together line by line ({error})") from error


def wino_why(path: Path) -> Iterator[tuple[str, Solved]]:
    """Winograd sentences with the reasons that people gave and judged valid."""
    rows: list[dict[str, Any]] = json_value(path)
    for number, row in enumerate(rows):
        text = row["text"]
        answers = [answer.strip() for answer in row["answers"]]
        question = (
            f"{text['txt1'].strip()} {text['pron'].strip()} {text['txt2'].strip()}\n"
            f'Who or what is "{text["pron"].strip()}": {" or ".join(answers)}?'
        )
        # Of the letters of two answers, written with a full stop in some rows.
        answer = answers[0 if row["correctAnswer"].strip(" .") == "A" else 1]
        reasons = tuple(
            reason for reason, source, _, label in row["reasons"] if (source, label) == ("human", "Valid")
        )
        yield str(number), (question, answer, reasons) if reasons else "no reason judged valid"
