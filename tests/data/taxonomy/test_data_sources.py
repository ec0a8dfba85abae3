import pytest

from megatron_iml.data.taxonomy.data_sources import ALIASES, data_source


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        ("boolq", ["super_glue__boolq", "bool_q", "boolq", " BoolQ", "superglue__boolq"]),
        ("race", ["race__high", "race__middle", "race"]),
        ("ai2arc", ["ai2_arc__ARC-Easy", "ai2_arc", "arc_challenge", "arc"]),
        ("commonsenseqa", ["commonsense_qa", "cos_e__v1.0", "cot_ecqa"]),
        ("winogrande", ["winogrande", "wino_grande", "winogrande__winogrande_debiased"]),
        ("wsc", ["super_glue__wsc.fixed", "wsc273", "enhanced_wsc", "winowhy"]),
        ("hotpotqa", ["hotpot_qa__fullwiki", "kilt_tasks__hotpotqa", "hotpotqa", "kilt_hotpotqa"]),
        ("snli", ["snli", "esnli", "e_snli", "e-SNLI"]),
    ],
)
def test_spellings_of_one_data_set(expected, names):
    assert {data_source(name) for name in names} == {expected}


def test_different_data_sets_stay_apart():
    names = [
        "super_glue__boolq",
        "super_glue__copa",
        "glue__mrpc",
        "race",
        "squad",
        "sst2",
        "mnli",
        "snli",
        "multi-news",
        "multi-woz",
    ]
    assert len({data_source(name) for name in names}) == len(names)


def test_aliases_lead_to_names_that_are_none_themselves():
    assert not set(ALIASES.values()) & set(ALIASES)
