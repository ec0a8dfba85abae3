"""A mixture file: how often each task is to be drawn. A YAML file enters, a checked `Mixture` leaves.

Every task weighs min(examples, cap) within its benchmark (examples-proportional mixing); a benchmark's
proportion, if the file gives any, then scales its tasks together. A proportion names its unit, because 5 % of
the examples may be 37 % of the tokens; no document is drawn more than `max_epochs` times, if that is given:

    examples_proportional_cap: 4096
    max_epochs: 20
    benchmarks:
      NIV2:    {proportion: 0.95, unit: examples}
      replay:  {proportion: 0.05, unit: tokens, max_epochs: 1}

What shares of the draws follow from it for the tasks of a corpus: shares.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_iml.data.text_files import yaml_mapping

Unit = Literal["examples", "tokens", "target_tokens"]
UNITS: tuple[str, ...] = get_args(Unit)
SUM_TOLERANCE = 1e-6
PAPER_CAP = 4096  # OPT-IML chose it among 128 to 1,000,000; every cap up to it did about as well


@dataclass(frozen=True, slots=True)
class Proportion:
    """The part of a mixture that one benchmark gets, counted in `unit`."""

    proportion: float
    unit: Unit
    max_epochs: float | None = None
    """Most times that one of its documents is drawn; None leaves it to the mixture."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A cap on the size of every task, and a proportion for every benchmark or for none."""

    examples_proportional_cap: int = PAPER_CAP
    benchmarks: Mapping[str, Proportion] = field(default_factory=dict)
    max_epochs: float | None = None
    """Most times that one document is drawn, where its benchmark says nothing; None for no bound."""
    skip_absent: bool = False
    """Benchmarks that the corpus lacks leave their part to the others; else they are an error."""

    def epoch_bound(self, benchmark: str) -> float | None:
        """Return the most times that a document of this benchmark may be drawn, None for no bound."""
        share = self.benchmarks.get(benchmark)
        return self.max_epochs if share is None or share.max_epochs is None else share.max_epochs

    def as_dict(self) -> dict[str, Any]:
        """Return the mixture as it stands in its file."""
        # Part of a plan's fingerprint: another key or spelling here makes every plan that exists another one.
        return {
            "examples_proportional_cap": self.examples_proportional_cap,
            "max_epochs": self.max_epochs,
            "skip_absent": self.skip_absent,
            "benchmarks": {name: asdict(share) for name, share in self.benchmarks.items()},
        }


def load_mixture(path: Path) -> Mixture:
    """Read a mixture file.

    Raises FileNotFoundError, or ValueError for unknown keys and units, a cap below 1, epochs not above 0,
    proportions outside [0, 1] or with another sum than 1.
    """
    content = yaml_mapping(path)
    _check_keys(f"{path}:", content, ("examples_proportional_cap", "max_epochs", "skip_absent", "benchmarks"))
    cap = content.get("examples_proportional_cap", PAPER_CAP)
    # `true` is an int to Python and would pass for 1.
    if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
        raise ValueError(f"{path}: examples_proportional_cap is {cap!r}, expected a whole number from 1 up")
    benchmarks = content.get("benchmarks") or {}
    if not isinstance(benchmarks, dict):
        raise ValueError(
            f"{path}: benchmarks is {benchmarks!r}, expected name: {{proportion: ..., unit: ...}}"
        )
    # Keys as text: a benchmark called 2024 is a number to YAML.
    shares = {
        str(name): _proportion(f"{path}: benchmark {name}", value) for name, value in benchmarks.items()
    }
    total = sum(share.proportion for share in shares.values())
    if shares and abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"{path}: the proportions sum to {total:.6g}, expected 1; scale them")
    _check_units(path, shares)
    skip_absent = content.get("skip_absent", False)
    if not isinstance(skip_absent, bool):
        raise ValueError(f"{path}: skip_absent is {skip_absent!r}, expected true or false")
    return Mixture(cap, shares, _max_epochs(f"{path}:", content), skip_absent)


def _check_keys(place: str, content: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in content:
        if key not in allowed:
            near = get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(allowed)}"
            raise ValueError(f"{place} unknown key {key!r}; {hint}")


def _proportion(place: str, value: object) -> Proportion:
    if not isinstance(value, dict) or "proportion" not in value or "unit" not in value:
        raise ValueError(f"{place}: got {value!r}, expected {{proportion: 0.25, unit: examples}}")
    _check_keys(place, value, ("proportion", "unit", "max_epochs"))
    number, unit = value["proportion"], value["unit"]
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 <= number <= 1:
        raise ValueError(f"{place}: proportion is {number!r}, expected a number from 0 to 1")
    if unit not in UNITS:
        raise ValueError(f"{place}: unit is {unit!r}, expected one of {', '.join(UNITS)}")
    return Proportion(float(number), unit, _max_epochs(place, value))


def _max_epochs(place: str, content: Mapping[str, Any]) -> float | None:
    value = content.get("max_epochs")
    if value is None:
        return None
    # YAML has .inf and .nan, and no number of documents follows from either.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(
            f"{place} max_epochs is {value!r}, expected a number above 0; leave it out for no bound"
        )
    return float(value)


def _check_units(path: Path, shares: Mapping[str, Proportion]) -> None:
    # Shares of tokens and shares of target tokens that are to hold at once need not have a solution.
    used = {share.unit for share in shares.values() if share.proportion > 0}
    if {"tokens", "target_tokens"} <= used:
        raise ValueError(
            f"{path}: tokens and target_tokens are both units here; use one of them and examples"
        )
