"""What a mixture makes of the tasks of a corpus: a mixture and task sizes enter, shares of the draws leave.

With NIV2 documents of 100 tokens and replay documents of 1,000, replay is to be 5 % of the tokens: for every
NIV2 document (100 tokens, 95 %) come 100 x 0.05 / 0.95 = 5.26 tokens of replay, 0.00526 documents; the shares
of draws are 0.99476 and 0.00524. Benchmarks counted in examples divide what is left among themselves in
proportion to their numbers. Without proportions the capped sizes alone decide.

A task that would be drawn more than `max_epochs` times its documents stays there, and the other tasks of its
benchmark take what it leaves. A benchmark whose tasks all stay there cannot have its proportion: a shortfall.

Suffixes: K tasks, of a benchmark or of the corpus.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.plan.mixture import Mixture, Proportion, Unit

Shares = NDArray[np.float64]
Int64 = NDArray[np.int64]

UNBOUNDED = 1 << 60
"""Draws of a task without `max_epochs`."""
TOLERANCE = 1e-9
# Of an interval, until a float cannot be halved further.
HALVINGS = 60
# The scale may grow this much over what it would be without bounds before the rows count as out of reach.
LARGEST_GROWTH = 1e9


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

    @property
    def slots(self) -> float:
        """Slots of a row that one draw takes."""
        # A draw of t tokens takes t - 1, but one that is dropped takes none, hence the bound from below.
        return max(self.tokens - 1, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """Shares of the draws, how many draws there will be about, and what cannot be had."""

    shares_K: Shares
    draws: int
    most_K: Int64
    """Draws that a task may have at most."""
    shortfalls: tuple[str, ...]
    """What the mixture asks for and the corpus cannot give, in words."""


@dataclass(frozen=True, slots=True, eq=False)
class _Benchmark:
    """The tasks of one benchmark: where they are, what they weigh, how often they may be drawn."""

    name: str
    share: Proportion
    indices_K: Int64
    effective_K: Shares
    per_draw_K: Shares
    """In the unit of the proportion."""
    most_K: Int64

    def draws(self, amount: float) -> Shares:
        """Return draws of every task that bring this amount, as far as their bounds let them.

        Draws are min(most, level x effective); the level follows from the amounts at which tasks fill up.
        """
        # The level at which a task fills up: those of the lowest ratio first.
        ratio_K = self.most_K / self.effective_K
        order_K = np.argsort(ratio_K, kind="stable")
        full_K = np.cumsum((self.most_K * self.per_draw_K)[order_K])
        # From the right: what a level of 1 brings from the tasks that are not full before this one.
        open_K = np.cumsum((self.effective_K * self.per_draw_K)[order_K][::-1])[::-1]
        # The amount when the next task in this order fills up, those before it being full.
        before_K = np.concatenate(([0.0], full_K[:-1]))
        reached = int(np.searchsorted(before_K + ratio_K[order_K] * open_K, amount))
        # All are full, or those that are not hold nothing in this unit and cannot help.
        if reached == len(order_K) or open_K[reached] == 0:
            return self.most_K.astype(float)
        level = (amount - before_K[reached]) / open_K[reached]
        return np.minimum(self.most_K, level * self.effective_K)


@dataclass(frozen=True, slots=True, eq=False)
class _Recipe:
    """The benchmarks of a mixture: those counted in examples lead, those counted in tokens follow."""

    benchmarks: Sequence[_Benchmark]
    tasks: Sequence[TaskSize]

    def amounts(self, scale: float) -> dict[str, float]:
        """Return how much every benchmark is to bring, in its unit; `scale` is about the examples in all."""
        leading = {b.name: b.share.proportion * scale for b in self.benchmarks if b.share.unit == "examples"}
        counted = [b for b in self.benchmarks if b.share.unit != "examples"]
        everything = scale
        if counted and leading:
            # The unit of the first is that of all: a mixture with both tokens and target tokens is refused.
            brought = sum(
                self._brought(b, leading[b.name], counted[0].share.unit)
                for b in self.benchmarks
                if b.name in leading
            )
            # What they bring is the rest of everything, in the unit of those that follow.
            # Never a division by 0: what leads has a proportion above 0, so the others leave some.
            everything = brought / (1 - sum(b.share.proportion for b in counted))
        return leading | {b.name: b.share.proportion * everything for b in counted}

    def _brought(self, benchmark: _Benchmark, amount: float, unit: Unit) -> float:
        per_draw_K = np.array([self.tasks[k].per_draw(unit) for k in benchmark.indices_K])
        return float(benchmark.draws(amount) @ per_draw_K)

    def draws(self, scale: float) -> Shares:
        """Return the draws of every task, [K]."""
        amounts = self.amounts(scale)
        draws_K = np.zeros(len(self.tasks))
        for benchmark in self.benchmarks:
            draws_K[benchmark.indices_K] = benchmark.draws(amounts[benchmark.name])
        return draws_K

    def shortfalls(self, scale: float) -> tuple[str, ...]:
        """Say which benchmarks cannot bring their amount."""
        found = []
        for benchmark in self.benchmarks:
            asked = self.amounts(scale)[benchmark.name]
            got = float(benchmark.draws(asked) @ benchmark.per_draw_K)
            if got < asked * (1 - TOLERANCE):
                share = benchmark.share
                found.append(
                    f"benchmark {benchmark.name!r} is to be {share.proportion:.4g} of the {share.unit}, "
                    f"{asked:,.0f} for these rows; max_epochs allows {got:,.0f}: raise it, lower the "
                    "proportion or ask for fewer rows"
                )
        return tuple(found)


def blend_tasks(mixture: Mixture, tasks: Sequence[TaskSize], slots: float) -> Blend:
    """Return shares of draws that follow the mixture and fill so many slots of rows.

    Raises ValueError when benchmarks of the mixture and of the corpus differ, or no document fits a row.
    """
    recipe = _Recipe(_benchmarks(mixture, tasks), tasks)
    slots_K = np.array([task.slots for task in tasks])
    # So small a scale that no bound is felt: slots then grow with it evenly.
    per_scale = float(recipe.draws(TOLERANCE) @ slots_K) / TOLERANCE
    if per_scale == 0:
        if not recipe.draws(TOLERANCE).any():
            names = ", ".join(sorted({task.benchmark for task in tasks}))
            raise ValueError(
                f"the mixture draws nothing from this corpus: it holds {names}, all of proportion 0; give "
                "one of them a proportion, or build the corpus from benchmarks that the mixture draws"
            )
        raise ValueError("no document of the mixture fits a row; raise row_length")
    # Bounds make slots a bent function of the scale, so it is searched for and not solved.
    # A bound may cost slots or bring some (its draws go to longer documents), so the scale is on either side.
    low, high = 0.0, slots / per_scale
    out_of_reach = high * LARGEST_GROWTH
    # Rows that exhaust every benchmark are never full, so the search has an end.
    while recipe.draws(high) @ slots_K < slots * (1 - TOLERANCE) and high < out_of_reach:
        low, high = high, high * 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if recipe.draws(middle) @ slots_K < slots else (low, middle)
    draws_K = recipe.draws(high)
    shortfalls = recipe.shortfalls(high)
    # In place of what benchmarks lack: after so long a search each of them lacks something.
    if (filled := float(draws_K @ slots_K)) < slots * (1 - TOLERANCE):
        shortfalls = (
            f"the rows have {slots:,.0f} slots, max_epochs allows documents for {filled:,.0f}: raise it or "
            "ask for fewer rows",
        )
    most_K = np.array([_most_draws(mixture, task) for task in tasks])
    return Blend(draws_K / draws_K.sum(), max(round(float(draws_K.sum())), 1), most_K, shortfalls)


def _most_draws(mixture: Mixture, task: TaskSize) -> int:
    bound = mixture.epoch_bound(task.benchmark)
    # At least one, or a small bound would silence the small tasks of a benchmark and leave its large ones.
    return UNBOUNDED if bound is None else max(int(bound * task.documents), 1)


def _benchmarks(mixture: Mixture, tasks: Sequence[TaskSize]) -> list[_Benchmark]:
    """Return the benchmarks that are drawn from; without proportions all tasks count as one."""
    members: dict[str, list[int]] = {}
    for k, task in enumerate(tasks):
        members.setdefault(task.benchmark if mixture.benchmarks else "", []).append(k)
    shares = mixture.benchmarks or {"": Proportion(1.0, "examples")}
    _check_names(mixture, shares, members)
    found = []
    for name, share in shares.items():
        # A name without members is one that `skip_absent` lets pass, or _check_names would have refused it.
        if share.proportion == 0 or name not in members:
            continue
        here = [tasks[k] for k in members[name]]
        # Nothing it draws would be kept, and in tokens it would be drawn for ever.
        if mixture.benchmarks and not any(task.tokens for task in here):
            raise ValueError(f"benchmark {name!r} has no usable document but a proportion above 0; make it 0")
        found.append(
            _Benchmark(
                name,
                share,
                np.array(members[name]),
                np.array([min(task.documents, mixture.examples_proportional_cap) for task in here], float),
                np.array([task.per_draw(share.unit) for task in here]),
                np.array([_most_draws(mixture, task) for task in here]),
            )
        )
    return found


def absent_benchmarks(mixture: Mixture, tasks: Sequence[TaskSize]) -> list[str]:
    """Return the benchmarks that are to be drawn from and are not there, in the order of the mixture."""
    present = {task.benchmark for task in tasks}
    return [name for name, share in mixture.benchmarks.items() if share.proportion and name not in present]


def _check_names(mixture: Mixture, shares: Mapping[str, Proportion], members: Mapping[str, object]) -> None:
    for name, share in shares.items():
        if name not in members and share.proportion and not mixture.skip_absent:
            near = get_close_matches(name, list(members), n=3) or sorted(members)
            raise ValueError(
                f"the mixture names benchmark {name!r}, the corpus lacks it; near: {', '.join(near)}; "
                "correct it, leave it out, or set skip_absent: true"
            )
    for name in members:
        if name not in shares:
            raise ValueError(
                f"the corpus has benchmark {name!r}, the mixture gives it no proportion; "
                "give it one, 0 to leave it out"
            )


def largest_remainder(shares_K: Shares, total: int) -> Int64:
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


@dataclass(frozen=True, slots=True)
class Expected:
    """What a plan will hold of one task, or of one benchmark: expected values."""

    name: str
    documents: int
    effective: int
    """After the cap."""
    draws: float
    tokens: float
    target_tokens: float

    @property
    def epochs(self) -> float:
        """Times that each of its documents comes."""
        return self.draws / self.documents


def explain_tasks(mixture: Mixture, blend: Blend, tasks: Sequence[TaskSize]) -> list[Expected]:
    """Say what every task contributes."""
    draws_K = (blend.shares_K * blend.draws).tolist()
    cap = mixture.examples_proportional_cap
    return [
        Expected(
            task.name,
            task.documents,
            min(task.documents, cap),
            draws,
            draws * task.tokens,
            draws * task.target_tokens,
        )
        for task, draws in zip(tasks, draws_K, strict=True)
    ]


def explain_benchmarks(expected: Sequence[Expected], tasks: Sequence[TaskSize]) -> list[Expected]:
    """Sum up the tasks of every benchmark, in the order of their names."""
    sums: dict[str, list[Expected]] = {}
    for line, task in zip(expected, tasks, strict=True):
        sums.setdefault(task.benchmark, []).append(line)
    return [
        Expected(
            name,
            sum(line.documents for line in lines),
            sum(line.effective for line in lines),
            sum(line.draws for line in lines),
            sum(line.tokens for line in lines),
            sum(line.target_tokens for line in lines),
        )
        for name, lines in sorted(sums.items())
    ]
