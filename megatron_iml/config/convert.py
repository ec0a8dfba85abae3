"""Plain YAML values to the typed fields of the dataclasses in `schema.py`, strictly.

    convert("1e-5", float, "optimizer.learning_rate")   ->  1e-05   (PyYAML reads 1e-5 as a string)
    convert("4e3", int, "training.steps")               ->  4000
    convert("yes", bool, "parallel.sequence_parallel")  ->  ValueError: got 'yes', allowed true or false

Nothing is guessed: a number in quotes that parses is taken, a number where a text belongs is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_iml.config.schema import Config


def convert(value: object, kind: Any, key: str) -> Any:
    """`value` as an instance of the annotation `kind`; `key` names the field in errors.

    `kind` is int, float, bool, str, Literal[...], `X | None`, dict[str, X], tuple[X, ...] or a section's
    dataclass. Raises ValueError with what was got and what is allowed.
    """
    # First: get_origin knows nothing of dataclasses, and a section is no value.
    if is_dataclass(kind):
        return _section(value, kind, key)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        # The schema's only unions are `X | None`.
        (inner,) = (arm for arm in get_args(kind) if arm is not NoneType)
        return None if value is None else convert(value, inner, key)
    if origin is Literal:
        # YAML reads a bare on, off or null as no text: no word of a Literal may be one; `none` stays a text.
        if value in get_args(kind):
            return value
        raise ValueError(
            f"{key}: got {value!r}; allowed: {', '.join(map(str, get_args(kind)))}; pick one of these"
        )
    if origin is dict:
        return _dictionary(value, get_args(kind)[1], key)
    if origin is tuple:
        return _list(value, get_args(kind)[0], key)
    if kind is bool or kind is str:
        return _exactly(value, kind, key)
    return _number(value, kind, key)


def field_types(section: type) -> Mapping[str, Any]:
    """Field name -> annotation of a dataclass."""
    # Resolved: a field's own `type` may still be the text of an annotation.
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in fields(section)}


def known_keys() -> tuple[str, ...]:
    """Every `section.field` of the schema, in its order."""
    sections = field_types(Config)
    return tuple(f"{section}.{name}" for section, kind in sections.items() for name in field_types(kind))


def unknown_key(key: str) -> str:
    """What is wrong with `key`, the names nearest to it, and where all names are."""
    # A right name in the wrong section is the commonest slip, and edit distance ranks it badly.
    elsewhere = [known for known in known_keys() if known.rpartition(".")[2] == key.rpartition(".")[2]]
    sections = list(field_types(Config))
    section, _, name = key.partition(".")
    siblings = [known.partition(".")[2] for known in known_keys() if known.startswith(section + ".")]
    # The section is probably right: its name would make every field of it look near.
    near = [f"{section}.{sibling}" for sibling in get_close_matches(name, siblings, n=2, cutoff=0.7)]
    others = [known for known in (*known_keys(), *sections) if known != section]
    nearest = elsewhere or near or get_close_matches(key, others, n=1, cutoff=0.6)
    allowed = f"in {section}: {', '.join(siblings)}" if siblings else f"the sections {', '.join(sections)}"
    # A far-fetched guess would be worse than none.
    remedy = f"did you mean {' or '.join(nearest)}?" if nearest else "remove it"
    return f"unknown key: got {key}; allowed {allowed}; {remedy}"


def _section(value: object, kind: Any, key: str) -> Any:
    """The dataclass `kind` from a mapping; a section whose fields are all commented out is YAML's null."""
    values = {} if value is None else value
    if not isinstance(values, dict):
        raise ValueError(
            f"{key or 'the file'}: got {value!r}; allowed: a mapping of names to values; indent its fields"
        )
    types = field_types(kind)
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in types:
            raise ValueError(unknown_key(f"{prefix}{name}"))
    return kind(**{name: convert(item, types[name], f"{prefix}{name}") for name, item in values.items()})


def _dictionary(value: object, kind: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key}: got {value!r}; allowed: a mapping of texts; write {key}: {{name: value}}")
    return {name: convert(item, kind, f"{key}.{name}") for name, item in value.items()}


def _list(value: object, kind: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{key}: got {value!r}; allowed: a list; write {key}: [first, second]")
    return tuple(convert(item, kind, f"{key}[{index}]") for index, item in enumerate(value))


def _exactly(value: object, kind: type, key: str) -> object:
    if isinstance(value, kind):
        return value
    allowed = "true or false" if kind is bool else "a text; put it in quotes"
    raise ValueError(f"{key}: got {value!r} ({type(value).__name__}); allowed: {allowed}")


def _number(value: object, kind: type, key: str) -> int | float:
    """`value` as an int or a finite float; whole floats and numbers in scientific notation count as ints."""
    wanted = "a whole number such as 4000 or 4e3" if kind is int else "a finite number such as 0.1 or 5e-5"
    refusal = f"{key}: got {value!r} ({type(value).__name__}); allowed: {wanted}"
    # bool is a subclass of int, so that `true` would pass for 1.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(refusal)
    if isinstance(value, int) and kind is int:
        return value  # not through float: exact above 2^53
    try:
        number = float(value)
    except ValueError:
        # The reason of float() would only say the same in its words.
        raise ValueError(refusal) from None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError(refusal)
    return kind(number)
