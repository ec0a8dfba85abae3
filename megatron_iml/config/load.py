"""A `Config` from one YAML file and `section.field=value` overrides, and back to YAML.

What enters, `train.yaml`:                       What leaves, after the override `training.steps=4e3`:

    model: {size: opt-125m}                          config.model.num_layers      == 12
    optimizer: {learning_rate: 5e-5}                 config.model.ffn_hidden_size == 3072
    checkpoint: {initial_weights: opt-125m}          config.training.steps        == 4000

Strict: an unknown or repeated key, or a value of another type, is a ValueError that names its origin, the key
and what is allowed. Whether the values fit one another and the cluster is the business of `rules.py`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType
from typing import get_args

import yaml

from megatron_iml.config.convert import convert, field_types, known_keys, unknown_key
from megatron_iml.config.schema import Config, ModelConfig
from megatron_iml.config.sizes import OPT_SIZES, OPTSize, opt_size
from megatron_iml.config.strict_yaml import parse_yaml


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of `path` (defaults alone if None) with `overrides` applied in order.

    `model.size` is resolved into explicit shape fields; fields that are given win over the size. Raises
    FileNotFoundError for a missing file, ValueError for everything else that is wrong.
    """
    # Without a file the command line alone makes a config, for quick tries.
    config = Config()
    origin = "command line" if path is None else str(path)
    with _located(origin):
        if path is not None:
            config = convert(_read_yaml(path), Config, "")
    # Onto the typed config, not into the YAML, so that a bad value is blamed on the override that holds it.
    for override in overrides:
        with _located(f"override {override}"):
            config = _override(config, override)
    with _located(origin):
        return replace(config, model=_resolve_model(config.model))


def save_config(config: Config, path: Path) -> None:
    """Write `config` as YAML that `load_config` reads back equal. The folder must exist."""
    # The schema's order, which groups what belongs together; the alphabet does not.
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False, width=100), encoding="utf-8")


def _read_yaml(path: Path) -> object:
    if not path.is_file():
        # Mostly a typing error: the file that was meant stands beside.
        found = ", ".join(sorted(sibling.name for sibling in path.parent.glob("*.yaml"))) or "no *.yaml"
        raise FileNotFoundError(
            f"config file: got {path}, which is not a file; allowed: a YAML file; {path.parent} has {found}"
        )
    return parse_yaml(path.read_text(encoding="utf-8"))


def _override(config: Config, override: str) -> Config:
    """`config` with one `section.field=value` put in; a text field takes the value as it stands."""
    # At the first "=" only: a path may hold others.
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError("got no '='; allowed: section.field=value; write it like training.steps=4000")
    # Checked before the section is taken apart: `training` alone, or `a.b.c`, is no key either.
    if key not in known_keys():
        raise ValueError(unknown_key(key))
    section_name, _, name = key.partition(".")
    section = vars(config)[section_name]
    kind = field_types(type(section))[name]
    # A run called 2024 or no is a text here, not the number or the bool that YAML sees.
    is_text = kind is str or (str in get_args(kind) and NoneType in get_args(kind) and text != "null")
    value = convert(text if is_text else parse_yaml(text), kind, key)
    # replace() and not a change in place: whoever holds the config before it keeps what it had.
    return replace(config, **{section_name: replace(section, **{name: value})})


def _resolve_model(model: ModelConfig) -> ModelConfig:
    """`model` with every shape field explicit."""
    if model.size is not None:
        size = opt_size(model.size)
        # What is given wins, so that opt-125m with two layers is a small model to try things on.
        given = {name: vars(model)[name] for name in size._fields if vars(model)[name]}
        model = replace(model, **{**size._asdict(), **given})
    # After the size: with it nothing is missing, and a size cannot give 0.
    missing = [name for name in OPTSize._fields if vars(model)[name] == 0]
    if missing:
        raise ValueError(
            f"model: got no {', '.join(missing)}; allowed: 1 or more; set model.size to one of "
            f"{', '.join(OPT_SIZES)}, or give these fields"
        )
    return replace(model, ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size)


@contextmanager
def _located(origin: str) -> Iterator[None]:
    """Put before a ValueError where the bad value came from: a file or an override."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
