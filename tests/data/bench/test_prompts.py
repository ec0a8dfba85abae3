from collections import Counter

import pytest

from megatron_iml.data.bench.prompts import DELIMITERS, choose_delimiter, clean_target, with_delimiter


def test_delimiters_are_the_papers_eight():
    assert len(set(DELIMITERS)) == 8
    assert "\noutput:" in DELIMITERS
    assert all(delimiter.endswith(":") for delimiter in DELIMITERS)


def test_choice_is_a_fixed_function_of_seed_task_and_id():
    # Recorded once: a change of these four would change every bench.
    choices = [choose_delimiter(1, "task", str(index)) for index in range(4)]
    assert choices == ["\nAnswer:", " Output:", " Answer:", " A:"]
    assert choices != [choose_delimiter(2, "task", str(index)) for index in range(4)]
    assert choices != [choose_delimiter(1, "other", str(index)) for index in range(4)]


def test_choice_is_uniform():
    counts = Counter(choose_delimiter(1, "task", str(index)) for index in range(8000))
    # 1,000 expected each; six standard deviations are 177.
    assert set(counts) == set(DELIMITERS)
    assert all(823 < count < 1177 for count in counts.values())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Q: hi\nA:", "Q: hi\nA:"),
        ("Q: hi\nA:  ", "Q: hi\nA:"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_no_delimiter_after_a_colon_or_without_a_source(source, expected):
    assert with_delimiter(source, 1, "task", "0") == expected


def test_trailing_spaces_go_and_newlines_stay():
    delimiter = choose_delimiter(1, "task", "0")
    assert with_delimiter("Is it day?  ", 1, "task", "0") == "Is it day?" + delimiter
    assert with_delimiter("Is it day?\n", 1, "task", "0") == "Is it day?\n" + delimiter


def test_targets_lose_blanks_but_keep_their_first_newline():
    assert clean_target("  Yes \n\t") == "Yes"
    assert clean_target("\nYes") == "\nYes"
    assert clean_target(" \n ") == ""
