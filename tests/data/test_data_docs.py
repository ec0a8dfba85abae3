"""docs/data.md names what there is."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

from megatron_iml.data.bench.demonstrations import Demonstrations
from megatron_iml.data.bench.splits import Splits
from megatron_iml.data.sources.registry import READERS
from megatron_iml.data.taxonomy.categories import load_categories

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_every_reader_and_option_is_in_the_table():
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (.*) \|$", DOCS, re.MULTILINE))
    assert set(READERS) <= set(rows)
    for name, read in READERS.items():
        options = [
            parameter.name
            for parameter in inspect.signature(read).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        missing = [option for option in options if f"`{option}" not in rows[name]]
        assert not missing, f"docs/data.md: the row of {name} lacks {missing}"


def test_every_key_of_a_splits_file_is_in_the_table():
    for field in fields(Splits):
        assert re.search(rf"^\| .*`{field.name}`", DOCS, re.MULTILINE), field.name


def test_every_option_of_demonstrations_is_in_the_table():
    for field in fields(Demonstrations):
        if field.name != "pool":
            assert f"| `--{field.name.replace('_', '-')}` |" in DOCS


def test_the_number_of_categories_is_the_tables():
    assert f"One level, {len(load_categories().names)} categories" in DOCS
