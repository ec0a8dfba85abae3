"""How often each task is drawn: a mixture file and the sizes of the tasks enter, one share per task leaves.

Every task weighs min(examples, cap) within its benchmark (examples-proportional mixing); a benchmark's
proportion, if the file gives any, then scales its tasks together. A proportion names its unit, because 5 % of
the examples may be 37 % of the tokens:

    examples_proportional_cap: 4096
    benchmarks:
      NIV2:    {proportion: 0.95, unit: examples}
      replay:  {proportion: 0.05, unit: tokens}

With NIV2 documents of 100 tokens and replay documents of 1,000, replay is to be 5 % of the tokens: for every
NIV2 document (100 tokens, 95 %) come 100 x 0.05 / 0.95 = 5.26 tokens of replay, 0.00526 documents; the shares
of draws are 0.99476 and 0.00524. Benchmarks counted in examples divide what is left among themselves in
proportion to their numbers. Without `benchmarks` the capped sizes alone decide.

Suffixes: K tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.text_files import yaml_mapping

Unit = Literal["examples", "tokens", "target_tokens"]
Shares = NDArray[np.float64]
UNITS: tuple[str, ...] = get_args(Unit)
SUM_TOLERANCE = 1e-6
PAPER_CAP = 4096  # OPT-IML chose it among 128 to 1,000,000; every cap up to it did about as well


@dataclass(frozen=True, slots=True)
class Proportion:
    """The part of a mixture that one benchmark gets, counted in `unit`."""

    proportion: float
    unit: Unit


@dataclass(frozen=True, slots=True)
class Mixture:
    """A cap on the size of every task, and a proportion for every benchmark or for none."""

    examples_proportional_cap: int = PAPER_CAP
    benchmarks: Mapping[str, Proportion] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the mixture as it stands in its file."""
        return {
            "examples_proportional_cap": self.examples_proportional_cap,
            "benchmarks": {name: asdict(share) for name, share in self.benchmarks.items()},
        }


@dataclass(frozen=True, slots=True)
class TaskSize:
    """What a mixture must know of a task: its documents, and the mean tokens that one draw brings."""

    name: str
    benchmark: str
    documents: int
    tokens: float
    target_tokens: float

    def per_draw(self, unit: Unit) -> float:
        """Return how much one draw counts in a unit."""
        return {"examples": 1.0, "tokens": self.tokens, "target_tokens": self.target_tokens}[unit]


@dataclass(frozen=True, slots=True)
class ExplainedTask:
    """What a mixture makes of one task over a number of draws; expected values."""

    name: str
    benchmark: str
    examples: int
    effective_examples: int
    """After the cap."""
    share: float
    """Of the draws."""
    epochs: float
    tokens: float
    target_tokens: float


def load_mixture(path: Path) -> Mixture:
    """Read a mixture file.

    Raises FileNotFoundError, or ValueError for unknown keys and units, a cap below 1, proportions outside
    [0, 1] or with another sum than 1.
    """
    content = yaml_mapping(path)
    _check_keys(f"{path}:", content, ("examples_proportional_cap", "benchmarks"))
    cap = content.get("examples_proportional_cap", PAPER_CAP)
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
    return Mixture(cap, shares)


def _check_keys(place: str, content: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in content:
        if key not in allowed:
            near = get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(allowed)}"
            raise ValueError(f"{place} unknown key {key!r}; {hint}")


def _proportion(place: str, value: object) -> Proportion:
    if not isinstance(value, dict) or "proportion" not in value or "unit" not in value:
        raise ValueError(f"{place}: got {value!r}, expected {{proportion: 0.25, unit: examples}}")
    _check_keys(place, value, ("proportion", "unit"))
    number, unit = value["proportion"], value["unit"]
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 <= number <= 1:
        raise ValueError(f"{place}: proportion is {number!r}, expected a number from 0 to 1")
    if unit not in UNITS:
        raise ValueError(f"{place}: unit is {unit!r}, expected one of {', '.join(UNITS)}")
    return Proportion(float(number), unit)


def _check_units(path: Path, shares: Mapping[str, Proportion]) -> None:
    # Shares of tokens and shares of target tokens that are to hold at once need not have a solution.
    used = {share.unit for share in shares.values() if share.proportion > 0}
    if {"tokens", "target_tokens"} <= used:
        raise ValueError(
            f"{path}: tokens and target_tokens are both units here; use one of them and examples"
        )


def task_shares(mixture: Mixture, tasks: Sequence[TaskSize]) -> Shares:
    """Return the share of draws of every task, float64 [K], summing to 1.

    Raises ValueError when the benchmarks of the file and of the corpus differ.
    """
    effective_K = np.array([min(task.documents, mixture.examples_proportional_cap) for task in tasks], float)
    if not mixture.benchmarks:
        return effective_K / effective_K.sum()
    members = _members_by_benchmark(mixture, tasks)
    shares_K = np.zeros(len(tasks))
    for indices in members.values():
        shares_K[indices] = effective_K[indices] / effective_K[indices].sum()
    weights = _benchmark_weights(
        mixture,
        {name: [(tasks[k], float(shares_K[k])) for k in indices] for name, indices in members.items()},
    )
    for name, indices in members.items():
        shares_K[indices] *= weights[name]
    # Once more, since units other than examples give relative weights.
    return shares_K / shares_K.sum()


def _benchmark_weights(
    mixture: Mixture, members: Mapping[str, Sequence[tuple[TaskSize, float]]]
) -> dict[str, float]:
    """Return relative numbers of draws from every benchmark, given its tasks with their shares within it."""
    used = {name: share for name, share in mixture.benchmarks.items() if share.proportion > 0}
    counted = [name for name, share in used.items() if share.unit != "examples"]
    unit: Unit = used[counted[0]].unit if counted else "examples"
    per_draw = {name: sum(share * task.per_draw(unit) for task, share in members[name]) for name in used}
    for name, mean in per_draw.items():
        # Dividing by it would ask for infinitely many draws.
        if mean == 0:
            raise ValueError(f"benchmark {name!r} has no usable document but a proportion above 0; make it 0")
    # Benchmarks counted in examples, drawn as often as they weigh, bring this much: the rest of everything.
    rest = 1.0 - sum(used[name].proportion for name in counted)
    brought = sum(used[name].proportion * per_draw[name] for name in used if name not in counted)
    everything = brought / rest if brought else 1.0
    weights = {name: share.proportion for name, share in mixture.benchmarks.items()}
    return weights | {name: weights[name] * everything / per_draw[name] for name in counted}


def _members_by_benchmark(mixture: Mixture, tasks: Sequence[TaskSize]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for k, task in enumerate(tasks):
        members.setdefault(task.benchmark, []).append(k)
    for name in mixture.benchmarks:
        if name not in members:
            near = get_close_matches(name, list(members), n=3) or sorted(members)
            raise ValueError(
                f"the mixture names benchmark {name!r}, the corpus lacks it; near: {', '.join(near)}"
            )
    for name in members:
        if name not in mixture.benchmarks:
            raise ValueError(
                f"the corpus has benchmark {name!r}, the mixture gives it no proportion; "
                "give it one, 0 to leave it out"
            )
    return members


def largest_remainder(shares_K: Shares, total: int) -> NDArray[np.int64]:
    """Return whole quotas that sum to `total`, each within 1 of share x total (Hamilton's method).

    Equal remainders are served in the order of the tasks: shares 1/3, 1/3, 1/3 of 4 become 2, 1, 1.
    """
    exact_K = shares_K * total
    quotas_K = np.floor(exact_K).astype(np.int64)
    # Rounded, so that remainders equal but for the last bit count as equal on every machine.
    remainders_K = np.round(exact_K - quotas_K, 9)
    missing = total - int(quotas_K.sum())
    quotas_K[np.argsort(-remainders_K, kind="stable")[:missing]] += 1
    return quotas_K


def explain(mixture: Mixture, tasks: Sequence[TaskSize], draws: int) -> list[ExplainedTask]:
    """Say what every task contributes to `draws` documents drawn from the mixture."""
    shares_K = task_shares(mixture, tasks)
    return [
        ExplainedTask(
            name=task.name,
            benchmark=task.benchmark,
            examples=task.documents,
            effective_examples=min(task.documents, mixture.examples_proportional_cap),
            share=share,
            epochs=share * draws / task.documents,
            tokens=share * draws * task.tokens,
            target_tokens=share * draws * task.target_tokens,
        )
        for task, share in zip(tasks, shares_K.tolist(), strict=True)
    ]
