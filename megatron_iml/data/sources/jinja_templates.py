"""PromptSource's template files: YAML with tags of its own, Jinja within.

What enters: a `templates.yaml` and a row. What leaves: a prompt, or None where the template does not apply.

    "Is {{word}} wet? ||| {{answer_choices[label]}}", answer_choices "Yes ||| No", {"word": "sea", "label": 0}
    ->  Prompt(source="Is sea wet?", target="Yes", candidates=("Yes", "No"))

Templates come from strangers, so they run in Jinja's sandbox. `choice` draws by the row and the template
alone: the same row gives the same prompt in every run.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment

SEPARATOR = "|||"
# A row's own "|||" must not part a prompt; a private character cannot come from a template.
HIDDEN = "\ue000\ue001\ue000"


class Prompt(NamedTuple):
    """What a template makes of a row; candidates only where the template has answer choices."""

    source: str
    target: str
    candidates: tuple[str, ...]


def draw(count: int, *key: str) -> int:
    """A number below `count` that follows from the key alone."""
    # Not `random`: its sequences may change between versions of Python.
    # 64 bits: the modulo favours no choice by more than a part in 10^15.
    return int.from_bytes(blake2b("\0".join(key).encode(), digest_size=8).digest(), "little") % count


@dataclass(frozen=True)
class Template:
    """One template, compiled."""

    name: str
    accuracy: bool
    """Whether its authors score it so: choices of other templates may be no more than part of an answer."""
    body: jinja2.Template
    answer_choices: jinja2.Template | None

    @property
    def ranks(self) -> bool:
        """Whether every prompt comes with candidates to rank."""
        return self.accuracy and self.answer_choices is not None

    def render(self, row: dict[str, Any], key: str) -> Prompt | None:
        """The prompt of a row; None where it renders blank, in other than two parts, or fails.

        Args:
            row: columns by name.
            key: decides what `choice` draws.
        """
        variables = {
            # `choice` last: a column of that name would hide the function from every template.
            **{name: _hide(value) for name, value in row.items()},
            "choice": _Choice(f"{key}\0{self.name}"),
        }
        try:
            if self.answer_choices is not None:
                # Before the body, which may use them: {{answer_choices[label]}}.
                choices = self.answer_choices.render(variables).split(SEPARATOR)
                variables["answer_choices"] = [
                    choice.strip().replace(HIDDEN, SEPARATOR) for choice in choices
                ]
            rendered = self.body.render(variables)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
            # What rows lack shows in many ways, e.g. `choices.index(answer)`; the reader counts them all.
            return None
        parts = [part.strip().replace(HIDDEN, SEPARATOR) for part in rendered.split(SEPARATOR)]
        # Templates leave a row out by rendering nothing for it, or no "|||".
        if len(parts) != 2 or not all(parts):
            return None
        candidates = variables.get("answer_choices", []) if self.ranks else []
        return Prompt(parts[0], parts[1], tuple(candidates))


def load_templates(path: Path) -> list[Template]:
    """Templates of a file that ask for the data set's original task, by name.

    Raises:
        ValueError: not a file of templates, or a template that is not Jinja; names the file.
    """
    entries = [entry for entry in _entries(path) if entry["metadata"]["original_task"]]
    try:
        return sorted((_compiled(entry) for entry in entries), key=lambda template: template.name)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{path}: template is not Jinja ({error}); fix or remove it") from error


def turned_templates(root: Path) -> frozenset[str]:
    """Templates below a folder that ask for another task than their data set's.

    Returns:
        `<data set> <subset> <template>` in `plain_name`'s spelling, as names of rendered files begin.
    """
    return frozenset(
        plain_name(*path.parent.relative_to(root).parts, entry["name"])
        for path in sorted(root.rglob("templates.yaml"))
        for entry in _entries(path)
        if not entry["metadata"]["original_task"]
    )


def plain_name(*parts: str) -> str:
    """Names as files of rendered prompts have them: lower case, `_` for whatever is no letter or digit."""
    return re.sub(r"[\W_]+", "_", "_".join(parts).lower()).strip("_")


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        # libyaml's loader: the repository has hundreds of these files, and the pure one is many times slower.
        entries = list(yaml.load(path.read_bytes(), Loader=_Loader)["templates"].values())
        # Looked up here, where the file can be named.
        for entry in entries:
            _ = entry["name"], entry["jinja"], entry["answer_choices"], entry["metadata"]["original_task"]
        return entries
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: not a PromptSource file of templates ({reason}); fix or remove it"
        ) from error


class _Loader(yaml.CSafeLoader):
    """YAML whose two tags of PromptSource are plain mappings."""


def _mapping(loader: yaml.CSafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


# On a loader of our own: add_constructor on yaml's would change it for the whole process.
for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _mapping)


def _compiled(entry: dict[str, Any]) -> Template:
    # A sandbox each: filters hold nothing, and templates cannot reach one another.
    environment = SandboxedEnvironment(loader=None, autoescape=False)
    # These four are what PromptSource's own environment offers beyond Jinja's.
    environment.globals["zip"] = zip
    environment.filters["most_frequent"] = _most_frequent
    # Markup of its web page there; a prompt wants the bare text.
    environment.filters["highlight"] = str
    environment.filters["choice"] = _draw_one
    choices = entry["answer_choices"]
    return Template(
        name=entry["name"],
        accuracy="Accuracy" in (entry["metadata"]["metrics"] or []),
        body=environment.from_string(entry["jinja"]),
        answer_choices=environment.from_string(choices) if choices else None,
    )


class _Choice:
    """`choice(items)` of one rendering: each call draws anew, all by one key."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._calls = 0

    def __call__(self, items: Sequence[Any]) -> Any:
        self._calls += 1
        return items[draw(len(items), self._key, str(self._calls))]


@jinja2.pass_context
def _draw_one(context: jinja2.runtime.Context, items: Sequence[Any]) -> Any:
    return context["choice"](items)


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    """The items that occur most often, all of them where several do."""
    # A list and not one item: templates pipe it on to `choice`.
    counted = Counter(items).most_common()
    return [item for item, count in counted if count == counted[0][1]]


def _hide(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(SEPARATOR, HIDDEN)
    if isinstance(value, list):
        return [_hide(item) for item in value]
    if isinstance(value, dict):
        return {key: _hide(item) for key, item in value.items()}
    return value
