"""T5 and UnifiedSKG."""

import pytest
from readers import Reading, write_files

from megatron_iml.data.sources import t5, unified_skg


def test_translations_as_rows_and_as_parallel_files(tmp_path):
    write_files(
        tmp_path,
        {
            "wmt16_enro_v003/train.jsonl": [
                {"translation": {"en": " Hello. ", "ro": "Salut."}},
                {"en": "Yes.", "ro": "Da."},
                {"translation": {"en": "No."}},
            ],
            "wmt14_ende/train.en": "One\u2028still one\nTwo\n",
            "wmt14_ende/train.de": "Eins\nZwei\n",
            "wmt14_ende/README.md": "x",
        },
    )
    found = Reading(t5.read, tmp_path)
    assert list(found.tasks) == ["wmt14_ende", "wmt16_enro"]
    first, second = found.examples("wmt16_enro")
    assert first.source == "Translate the English text to Romanian.\nHello."
    assert (first.targets, second.targets) == (("Salut.",), ("Da.",))
    assert found.counts("wmt16_enro").dropped == {"no text in en or ro": 1}
    german = found.examples("wmt14_ende")
    assert [(e.source.split("\n")[1], e.targets) for e in german] == [
        ("One\u2028still one", ("Eins",)),
        ("Two", ("Zwei",)),
    ]


def test_summaries(tmp_path):
    write_files(tmp_path, {"cnn_dailymail_v002/train.csv": 'article,highlights,id\n"A\nB",C,1\n ,D,2\n'})
    found = Reading(t5.read, tmp_path)
    (example,) = found.examples("cnn_dailymail")
    assert (example.source, example.targets) == ("Summarize the article.\nA\nB", ("C",))
    assert found.tasks["cnn_dailymail"].data_sources == ("cnndailymail",)


def test_an_instruction_of_ones_own_may_hold_braces(tmp_path):
    write_files(
        tmp_path,
        {
            "own.yaml": "wmt14: 'Put {it} into {target}:'\n",
            "wmt14_ende/a.en": "1\n",
            "wmt14_ende/a.de": "1\n",
        },
    )
    (example,) = Reading(t5.read, tmp_path, instructions="own.yaml").examples("wmt14_ende")
    assert example.source == "Put {it} into German:\n1"


def test_translations_that_do_not_go_together(tmp_path):
    found = Reading(t5.read, write_files(tmp_path, {"wmt14_ende/a.en": "1\n2\n", "wmt14_ende/a.de": "1\n"}))
    with pytest.raises(ValueError, match="a.en: does not go with a.de line by line"):
        found.examples("wmt14_ende")
    (tmp_path / "wmt14_ende" / "a.de").unlink()
    with pytest.raises(FileNotFoundError, match="has no file a.de beside it"):
        Reading(t5.read, tmp_path).examples("wmt14_ende")
    with pytest.raises(ValueError, match="ends in two languages of cs, de"):
        Reading(t5.read, write_files(tmp_path / "b", {"wmt14_enxx/a.en": "1\n"}))


def test_structured_knowledge_stands_between_question_and_context(tmp_path):
    table = {"header": ["name", "rank"], "rows": [["ann", 1], ["bob", 2]]}
    write_files(
        tmp_path,
        {
            "wikitq_test.jsonl": [
                {"text_in": "who won?", "struct_in": "col : name", "seq_out": "ann"},
                {"text_in": "and then? || who won?", "struct_in": "col : name", "seq_out": ["bob", "b"]},
                {"text_in": "", "table": table, "seq_out": 2},
                {"text_in": "", "struct_in": " ", "seq_out": "x"},
                {"text_in": "x", "struct_in": "y"},
            ],
            "tab_fact_validation.json": [{"text_in": "a", "struct_in": "b", "seq_out": "entailed"}],
        },
    )
    found = Reading(unified_skg.read, tmp_path)
    assert list(found.tasks) == ["tab_fact", "wikitq"]
    examples = found.examples("wikitq")
    sources = [example.source.split("\n") for example in examples]
    assert [source[0] for source in sources] == ["Answer the question from the table."] * 3
    assert [source[1] for source in sources] == [
        "who won? ; structured knowledge: col : name",
        "and then? ; structured knowledge: col : name ; context: who won?",
        "structured knowledge: col : name | rank row 1 : ann | 1 row 2 : bob | 2",
    ]
    assert [example.targets for example in examples][1:] == [("bob", "b"), ("2",)]
