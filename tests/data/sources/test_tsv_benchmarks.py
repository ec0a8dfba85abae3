"""CrossFit and ExMix: files without instructions."""

import pytest
from readers import Reading, write_files

from megatron_iml.data.sources import crossfit, exmix
from megatron_iml.data.sources.instructions import instruction_of, load_instructions

ENDING = "Choose the most plausible ending of the text."


def test_crossfit_draws_are_one_task_with_all_outputs(tmp_path):
    write_files(
        tmp_path,
        {
            "codah/codah_16_100_train.tsv": 'She (A) ran (B) "sat\t"sat\tsat down\n\nx\u2028y\tz\r\n',
            "codah/codah_16_13_train.tsv": "x\u2028y\tz\nnew\tend\n",
            "codah/codah_16_13_test.tsv": "",
            "blimp-ellipsis_n_bar_1/blimp-ellipsis_n_bar_1_16_21_dev.tsv": "a b\ta\n",
        },
    )
    found = Reading(crossfit.read, tmp_path)
    assert list(found.tasks) == ["blimp-ellipsis_n_bar_1", "codah"]
    assert found.tasks["blimp-ellipsis_n_bar_1"].data_sources == ("blimp",)
    # Files in their order: the draw of seed 100 before that of seed 13.
    examples = {example.source: example.targets for example in found.examples("codah")}
    assert examples == {
        f'{ENDING}\nShe (A) ran (B) "sat': ('"sat', "sat down"),
        f"{ENDING}\nx\u2028y": ("z",),
        f"{ENDING}\nnew": ("end",),
    }
    assert found.counts("codah").dropped == {"repeats a line of another draw": 1}
    assert found.drops.skipped_files == {"codah/codah_16_13_test.tsv": "empty file"}
    assert found.examples("blimp-ellipsis_n_bar_1")[0].source.startswith("Which of the two sentences")


def test_crossfit_lines_without_output_are_dropped(tmp_path):
    write_files(tmp_path, {"codah/codah_16_100_dev.tsv": "alone\n\tno input\nblank\t \n"})
    found = Reading(crossfit.read, tmp_path)
    assert found.examples("codah") == []
    assert found.counts("codah").dropped == {"no input or no output": 3}


def test_a_task_without_instruction_says_where_to_write_one(tmp_path):
    write_files(tmp_path, {"riddle/riddle_16_100_dev.tsv": "q\ta\n", "own.yaml": "riddle: Solve it.\n"})
    with pytest.raises(ValueError, match="CrossFit task 'riddle' has no instruction; write `riddle: <a sen"):
        Reading(crossfit.read, tmp_path)
    found = Reading(crossfit.read, tmp_path, instructions="own.yaml")
    assert found.examples("riddle")[0].source == "Solve it.\nq"


def test_crossfit_names(tmp_path):
    with pytest.raises(ValueError, match="expected a name <task>_<k>_<seed>_<split>.tsv"):
        Reading(crossfit.read, write_files(tmp_path, {"codah.tsv": "a\tb\n"}))


def test_the_longest_key_is_the_instruction():
    sentences = {"ethos": "a", "ethos-race": "b"}
    assert instruction_of(sentences, "ethos-race", "CrossFit") == "b"
    assert instruction_of(sentences, "ethos-religion", "CrossFit") == "a"
    with pytest.raises(ValueError, match="'ethosx' has no instruction"):
        instruction_of(sentences, "ethosx", "CrossFit")


def test_every_task_of_the_taxonomy_has_an_instruction(tmp_path):
    from megatron_iml.data.taxonomy.categories import load_categories

    for benchmark in ("CrossFit", "UnifiedSKG", "T5"):
        sentences = load_instructions(benchmark, tmp_path, "")
        tasks = [name for owner, name in load_categories().labels if owner == benchmark]
        assert len(tasks) > 6
        for name in tasks:
            assert instruction_of(sentences, name, benchmark)


def exmix_examples(tmp_path, data_set: str, files):
    found = Reading(exmix.read, write_files(tmp_path / data_set, files), data_set=data_set)
    (name,) = found.tasks
    assert name == data_set
    return found, found.examples(name)


def test_cogs_and_funql(tmp_path):
    found, examples = exmix_examples(
        tmp_path, "cogs", {"data/dev.tsv": "A boy ran .\tboy ( x _ 1 )\tin_distribution\nbroken\n"}
    )
    assert examples[0].source == "Translate the sentence into its logical form.\nA boy ran ."
    assert examples[0].targets == ("boy ( x _ 1 )",)
    assert found.counts("cogs").dropped == {"not two or three columns": 1}
    _, examples = exmix_examples(
        tmp_path,
        "geo_funql",
        {"geo/geo_funql_test.tsv": "q\tanswer(x)\n", "geo/geo_funql_train.tsv": "r\ty\n"},
    )
    assert [example.targets for example in examples] == [("answer(x)",), ("y",)]


def test_parallel_files_of_shakespearizing(tmp_path):
    files = {"train.modern.nltktok": "You are late .\n", "train.original.nltktok": "Thou art late .\n"}
    _, (example,) = exmix_examples(tmp_path, "shakespearizing", files)
    assert example.source.endswith("\nYou are late .") and example.targets == ("Thou art late .",)
    files["train.original.nltktok"] = "a\nb\n"
    with pytest.raises(ValueError, match="not as many lines as train.original.nltktok"):
        exmix_examples(tmp_path, "shakespearizing", files)
    files = {"valid.modern.nltktok": "You are late .\n"}
    with pytest.raises(FileNotFoundError, match="has no file valid.original.nltktok beside it; a"):
        exmix_examples(tmp_path / "half", "shakespearizing", files)


def test_ranked_and_other_forms(tmp_path):
    files = {"webtext.test.jsonl": [{"text": "a"}], "small-117M.test.jsonl": [{"text": "b"}, {"text": None}]}
    found, examples = exmix_examples(tmp_path, "gpt2_output", files)
    assert [(e.source[-1], e.targets, e.candidates) for e in examples] == [
        ("b", ("yes",), ("yes", "no")),
        ("a", ("no",), ("yes", "no")),
    ]
    assert found.tasks["gpt2_output"].metric == "accuracy"
    _, (example,) = exmix_examples(
        tmp_path, "dialoglue_banking", {"train.csv": "text,category\nHi,card_arrival\n"}
    )
    assert example.targets == ("card arrival",)
    rows = [
        {"id": 1, "input": "x", "output": [{"answer": "A"}, {"answer": "A"}, {"provenance": []}]},
        {"input": "y", "output": []},
    ]
    found, (example,) = exmix_examples(tmp_path, "wned", {"wned-dev-kilt.jsonl": rows})
    assert example.targets == ("A",)
    assert found.counts("wned").dropped == {"no input or no answer": 1}
    _, examples = exmix_examples(
        tmp_path, "wikipedia_toxicity_subtypes", {"t.csv": "comment_text,toxic\nx,1\ny,0.0\nz,false\n"}
    )
    assert [example.targets for example in examples] == [("yes",), ("no",), ("no",)]


def test_a_data_set_has_to_be_named(tmp_path):
    with pytest.raises(ValueError, match="exmix: no data set ''; give the option data_set: cogs"):
        Reading(exmix.read, tmp_path)


def test_files_that_repeat_others_are_not_read(tmp_path):
    pair = "q\ta\n"
    _, examples = exmix_examples(
        tmp_path, "cogs", {"train.tsv": pair, "gen.tsv": pair, "train_100.tsv": pair}
    )
    assert [example.id for example in examples] == ["gen.tsv-1", "train.tsv-1"]
    files = {"job_funql_test.tsv": pair, "job_funql_test_fixed.tsv": pair}
    _, examples = exmix_examples(tmp_path, "job_funql", files)
    assert [example.id for example in examples] == ["job_funql_test_fixed.tsv-1"]
    row = "text,category\nHi,x\n"
    _, examples = exmix_examples(
        tmp_path, "dialoglue_hwu", {"train.csv": row, "val.csv": row, "train_10.csv": row}
    )
    assert [example.id for example in examples] == ["train.csv-2", "val.csv-2"]
