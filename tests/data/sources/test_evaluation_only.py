"""BIG-Bench Hard, MMLU and RAFT: never trained on."""

import pytest
from readers import Reading, write_files

from megatron_iml.data.sources import big_bench_hard, mmlu, raft


def test_bbh_shows_the_description_and_scores_the_answer(tmp_path):
    examples = [{"input": "Sort: b a", "target": "a b"}, {"input": "x"}]
    write_files(
        tmp_path,
        {
            "bbh/word_sorting.json": {"canary": "no", "examples": examples},
            "bbh/navigate.json": {"examples": examples[:1]},
            "cot-prompts/word_sorting.txt": "canary\n-----\nSort a list of words.\n\nQ: Sort: d c\nA: c d\n",
        },
    )
    found = Reading(big_bench_hard.read, tmp_path)
    task = found.tasks["word_sorting"]
    assert (task.metric, task.evaluation_only, task.benchmark) == ("exact_match", True, "BBH")
    (example,) = found.examples("word_sorting")
    assert example.source == "Sort a list of words.\n\nQ: Sort: b a\nA:"
    assert (example.instruction, example.targets) == ("Sort a list of words.", ("a b",))
    assert found.counts("word_sorting").dropped == {"no input or no target": 1}
    assert found.examples("navigate")[0].source == "Q: Sort: b a\nA:"


def test_bbh_says_what_a_file_lacks(tmp_path):
    rows = {"examples": [{"input": "not True is", "target": "False"}, "not True is"]}
    files = {"bbh/boolean.json": rows, "cot-prompts/boolean.txt": "canary\n-----"}
    found = Reading(big_bench_hard.read, write_files(tmp_path, files))
    assert found.examples("boolean")[0].source == "Q: not True is\nA:"
    assert found.counts("boolean").dropped == {"not an object": 1}
    write_files(tmp_path, {"bbh/index.json": {"tasks": ["boolean"]}})
    with pytest.raises(ValueError, match=r"index.json: no list `examples`, .*; remove the file"):
        Reading(big_bench_hard.read, tmp_path)


def test_mmlu_subjects_are_parts_of_one_task(tmp_path):
    write_files(
        tmp_path,
        {
            "test/abstract_algebra_test.csv": '"What, is\n1+1?",1,2,3,"4 ""x""",B\nq,a,b,c,d,E\nshort,a\n',
            "val/abstract_algebra_val.csv": "q,a,b,c,d,A\n",
            "test/law_test.csv": "q,a,b,c,d,C\n",
        },
    )
    found = Reading(mmlu.read, tmp_path)
    assert list(found.tasks) == ["mmlu__abstract_algebra", "mmlu__law"]
    task = found.tasks["mmlu__abstract_algebra"]
    assert (task.parent, task.metric, task.evaluation_only) == ("mmlu", "accuracy", True)
    (example,) = found.examples("mmlu__abstract_algebra")
    assert example.source == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        'What, is\n1+1?\nA. 1\nB. 2\nC. 3\nD. 4 "x"\nAnswer:'
    )
    assert (example.targets, example.candidates) == (("B",), ("A", "B", "C", "D"))
    assert found.counts("mmlu__abstract_algebra").dropped == {"not a question, four answers and a letter": 2}
    assert list(Reading(mmlu.read, tmp_path, part="val").tasks) == ["mmlu__abstract_algebra"]


def test_raft_labels_are_candidates(tmp_path):
    train = 'Sentence,Label,ID\n"we, overrule",overruling,0\nno,not overruling,1\n'
    write_files(
        tmp_path,
        {
            "overruling/train.csv": train,
            "overruling/test_unlabeled.csv": "Sentence,ID\nx,50\n",
            "terms_of_service/train.csv": "Sentence,Label,ID\nx,fair,0\ny,other,1\n",
            "terms_of_service/task.json": {"label_columns": {"Label": ["unfair", "fair"]}},
        },
    )
    found = Reading(raft.read, tmp_path)
    first, second = found.examples("overruling")
    assert first.source == (
        "Does the sentence from a court's opinion overrule an earlier case?\n"
        "Possible labels: not overruling, overruling\n\nSentence: we, overrule\nLabel:"
    )
    assert (first.targets, second.targets) == (("overruling",), ("not overruling",))
    assert first.candidates == ("not overruling", "overruling")
    assert found.tasks["overruling"].evaluation_only
    (example,) = found.examples("terms_of_service")
    assert example.candidates == ("unfair", "fair")
    assert found.counts("terms_of_service").dropped == {"label is not one of the task's": 1}


def test_raft_needs_labels(tmp_path):
    with pytest.raises(ValueError, match="train.csv: no column `Label`"):
        Reading(raft.read, write_files(tmp_path, {"overruling/train.csv": "Sentence,ID\nx,0\n"}))
