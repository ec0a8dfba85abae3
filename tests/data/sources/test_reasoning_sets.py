"""The reasoning data sets in the files of their own repositories."""

import json

import pytest
from readers import Reading, write_files

from megatron_iml.data.sources.reasoning import DATA_SETS, read

STEP = "Answer the following question by reasoning step by step.\n"
MATH = "Answer the following math question by reasoning step by step.\n"


def solved(tmp_path, data_set: str, files):
    found = Reading(read, write_files(tmp_path / data_set, files), data_set=data_set)
    examples = found.examples(data_set)
    assert all(example.category == "Reasoning" for example in examples)
    return found.counts(data_set), [(example.source, example.targets) for example in examples]


def test_aqua_is_json_lines_in_a_json_file(tmp_path):
    row = '{"question": "1+1?", "options": ["A)1", "B)2"], "rationale": "Count.\\nTwo.", "correct": "B"}\n'
    files = {"dev.json": row * 2 + '{"question": "x"}\n', "dev.tok.json": row}
    counts, examples = solved(tmp_path, "aqua", files)
    assert examples == [(f"{MATH}1+1?\nA)1\nB)2", ("Count.\nTwo. The answer is B",))] * 2
    assert counts.dropped == {"fields are missing or of another kind": 1}


def test_strategyqa_has_booleans_and_facts(tmp_path):
    rows = [
        {"qid": "a", "question": "Do hamsters hunt?", "answer": False, "facts": ["They are prey.", "So no."]},
        {"qid": "b", "question": "Is it?", "answer": True, "facts": []},
    ]
    counts, examples = solved(tmp_path, "strategyqa", {"dev.json": rows})
    assert examples == [(f"{STEP}Do hamsters hunt?", ("They are prey. So no. The answer is no",))]
    assert counts.dropped == {"no question, answer or reasoning": 1}


def test_creak(tmp_path):
    row = '{"sentence": "Soup is solid.", "explanation": "It is liquid.", "label": "false"}\n'
    _, examples = solved(tmp_path, "creak", {"data/creak/dev.json": row})
    assert examples == [
        (
            f"{STEP}Is the following sentence true or false?\nSoup is solid.",
            ("It is liquid. The answer is false",),
        )
    ]


def test_cos_e_is_joined_on_its_ids(tmp_path):
    def question(id: str) -> dict[str, object]:
        choices = [{"label": "A", "text": "sea"}, {"label": "B", "text": "sun"}]
        return {"id": id, "answerKey": "A", "question": {"stem": "Wet?", "choices": choices}}

    files = {
        "v1.0/dev_rand_split.jsonl": [question("x"), question("y")],
        "v1.0/cose_dev_v1.0_processed.jsonl": [{"id": "x", "explanation": {"open-ended": "It is water."}}],
    }
    counts, examples = solved(tmp_path, "cos_e", files)
    assert examples == [(f"{STEP}Wet?\n(A) sea\n(B) sun", ("It is water. The answer is sea",))]
    assert counts.dropped == {"no explanation of that id": 1}


def test_e_snli_is_joined_by_line(tmp_path):
    files = {
        "s1.dev": "It rains.\nx\n",
        "s2.dev": "It is wet.\ny\n",
        "labels.dev": "entailment\nneutral\n",
        "preproc1_expl_1.dev": "rain is wet .\n\n",
    }
    counts, examples = solved(tmp_path, "e_snli", files)
    question = "Premise: It rains.\nHypothesis: It is wet.\nDoes the premise entail the hypothesis?"
    assert examples == [(STEP + question, ("rain is wet . The answer is entailment",))]
    assert counts.dropped == {"no question, answer or reasoning": 1}
    with pytest.raises(ValueError, match="do not go together line by line"):
        solved(tmp_path, "e_snli", files | {"labels.dev": "entailment\n"})


def test_winowhy_keeps_the_reasons_that_people_gave_and_judged_valid(tmp_path):
    reasons = [["r1", "human", 1.0, "Valid"], ["r2", "gpt", 1.0, "Valid"], ["r3", "human", 0.6, "Undecided"]]
    row = {
        "text": {"txt1": "Ann saw Bo since", "pron": "she", "txt2": "looked."},
        "answers": ["Ann", "Bo"],
        "correctAnswer": " A. ",
        "reasons": [*reasons, ["r4", "human", 1.0, "Valid"]],
    }
    counts, examples = solved(tmp_path, "winowhy", {"winowhy.json": [row, row | {"reasons": reasons[1:]}]})
    question = 'Ann saw Bo since she looked.\nWho or what is "she": Ann or Bo?'
    assert examples == [(STEP + question, ("r1 The answer is Ann", "r4 The answer is Ann"))]
    assert counts.dropped == {"no reason judged valid": 1}


def test_ecqa_qasc_and_proofwriter(tmp_path):
    header = "q_no,q_text,q_op1,q_op2,q_op3,q_op4,q_op5,q_ans,taskB\n"
    _, examples = solved(
        tmp_path, "ecqa", {"cqa_data_train.csv": header + '1,Wet?,a,b,c,d,e,c,"C, as rain."\n'}
    )
    assert examples == [(f"{STEP}Wet?\n- a\n- b\n- c\n- d\n- e", ("C, as rain. The answer is c",))]
    choices = [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]
    row = {"question": {"stem": "S?", "choices": choices}, "answerKey": "B", "fact1": "F.", "fact2": "G."}
    counts, examples = solved(tmp_path, "qasc", {"train.jsonl": [row, row | {"answerKey": 1}]})
    assert examples == [(f"{STEP}S?\n(A) x\n(B) y", ("F. G. The answer is y",))]
    row = {"theory": "T.", "question": "Q.", "answer": True, "allProofs": "T -> Q"}
    _, examples = solved(tmp_path, "proofwriter", {"dev.jsonl": [row]})
    question = f"{STEP}T.\nIs the following true, false or unknown? Q."
    assert examples == [(question, ("T -> Q The answer is true",))]
    meta = {"theory": "T.", "allProofs": "T -> Q", "questions": {"Q1": row, "Q2": {"question": "R."}}}
    counts, examples = solved(tmp_path / "meta", "proofwriter", {"meta-dev.jsonl": [meta]})
    assert examples == [(question, ("T -> Q The answer is true",))]
    assert counts.dropped == {"fields are missing or of another kind": 1}


def test_qed_explains_by_a_sentence_of_the_paragraph(tmp_path):
    row = {
        "example_id": -(2**62),
        "question_text": "who ran?",
        "paragraph_text": "Ann ran. Bo sat.",
        "annotation": {
            "answer": [{"paragraph_reference": {"string": "Ann"}}],
            "selected_sentence": {"string": "Ann ran."},
        },
    }
    _, examples = solved(tmp_path, "qed", {"qed-dev.jsonlines": json.dumps(row) + "\n"})
    assert examples == [(f"{STEP}Ann ran. Bo sat.\nwho ran?", ("Ann ran. The answer is Ann",))]


def test_math_answers_stand_in_a_box_of_nested_braces(tmp_path):
    files = {
        "train/algebra/1.json": {"problem": "p", "solution": r"Two. \boxed{1} so \boxed{\frac{1}{2}}."},
        "train/geometry/1.json": {"problem": "q", "solution": "none"},
        "train/geometry/2.json": {"problem": "q", "solution": r"\boxed{1"},
    }
    counts, examples = solved(tmp_path, "math", files)
    assert examples == [(f"{MATH}p", (r"Two. \boxed{1} so \boxed{\frac{1}{2}}. The answer is \frac{1}{2}",))]
    assert counts.dropped == {"no \\boxed answer": 2}


def test_coqa_questions_follow_the_conversation(tmp_path):
    story = {
        "story": "Ann ran.",
        "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "Did what?", "turn_id": 2}],
        "answers": [{"input_text": "Ann", "span_text": "Ann"}, {"input_text": "ran", "span_text": "Ann ran"}],
    }
    _, examples = solved(tmp_path, "coqa", {"coqa-train-v1.0.json": {"data": [story]}})
    assert examples == [
        (f"{STEP}Ann ran.\nQ: Who?", ("Ann The answer is Ann",)),
        (f"{STEP}Ann ran.\nQ: Who?\nA: Ann\nQ: Did what?", ("Ann ran The answer is ran",)),
    ]


def test_coqa_story_that_lacks_an_answer_is_counted(tmp_path):
    whole = {
        "story": "Ann ran.",
        "questions": [{"input_text": "Who?", "turn_id": 1}],
        "answers": [{"input_text": "Ann", "span_text": "Ann"}],
    }
    file = {"data": [{**whole, "answers": []}, whole]}
    counts, examples = solved(tmp_path, "coqa", {"coqa-train-v1.0.json": file})
    assert examples == [(f"{STEP}Ann ran.\nQ: Who?", ("Ann The answer is Ann",))]
    assert counts.dropped == {"not as many answers as questions in the story": 1}


@pytest.mark.parametrize(
    ("data_set", "file", "content"),
    [
        ("coqa", "coqa-dev-v1.0.json", {"version": 1}),
        ("winowhy", "winowhy.json", [{"text": "x"}]),
        ("winowhy", "winowhy.json", {"rows": []}),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, data_set, file, content):
    with pytest.raises(ValueError, match=rf"{file}: not in the format of its data set .*; fix or remove"):
        solved(tmp_path, data_set, {file: content})


def test_a_data_set_has_to_be_named(tmp_path):
    with pytest.raises(
        ValueError, match="reasoning: no data set 'gsm8k'; give the option data_set: aqua, coqa"
    ):
        Reading(read, tmp_path, data_set="gsm8k")
    assert len(DATA_SETS) == 12
