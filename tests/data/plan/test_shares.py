"""Shares of draws: what caps, proportions, units and epoch bounds lead to, worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_iml.data.plan.mixture import Mixture, Proportion
from megatron_iml.data.plan.shares import (
    TaskSize,
    absent_benchmarks,
    blend_tasks,
    explain_benchmarks,
    explain_tasks,
    largest_remainder,
)

NIV2_LONG = TaskSize("NIV2__a__long", "NIV2", documents=6000, tokens=200.0, target_tokens=10.0)
NIV2_SHORT = TaskSize("NIV2__a__short", "NIV2", documents=1024, tokens=50.0, target_tokens=5.0)
FLAN = TaskSize("FLAN__b__one", "FLAN", documents=512, tokens=100.0, target_tokens=40.0)
REPLAY = TaskSize("replay__c__all", "replay", documents=90, tokens=1000.0, target_tokens=999.0)
TASKS = [NIV2_LONG, NIV2_SHORT, FLAN, REPLAY]


SLOTS = 1e6


def task_shares(mixture: Mixture, tasks: list[TaskSize]) -> np.ndarray:
    blend = blend_tasks(mixture, tasks, SLOTS)
    assert blend.shortfalls == ()
    # So many draws fill the rows, whatever the shares are.
    slots = blend.draws * sum(share * task.slots for share, task in zip(blend.shares_K, tasks, strict=True))
    assert slots == pytest.approx(SLOTS, rel=1e-3)
    return blend.shares_K


def test_a_mixture_that_draws_nothing_names_what_is_there() -> None:
    with pytest.raises(
        ValueError, match=r"draws nothing from this corpus: it holds FLAN, all of proportion 0; give"
    ):
        blend_tasks(mixture(FLAN=(0.0, "examples")), [FLAN], SLOTS)


def mixture(**shares: tuple[float, str]) -> Mixture:
    return Mixture(4096, {name: Proportion(part, unit) for name, (part, unit) in shares.items()})


def shares_of(mixture: Mixture, unit: str) -> dict[str, float]:
    """What each benchmark really gets, counted in a unit."""
    shares = task_shares(mixture, TASKS)
    amounts = {task.name: share * task.per_draw(unit) for task, share in zip(TASKS, shares, strict=True)}
    total = sum(amounts.values())
    return {
        name: sum(amounts[task.name] for task in TASKS if task.benchmark == name) / total
        for name in ("NIV2", "FLAN", "replay")
    }


def test_cap_alone() -> None:
    shares = task_shares(Mixture(4096), TASKS)
    assert shares.tolist() == pytest.approx([4096 / 5722, 1024 / 5722, 512 / 5722, 90 / 5722])


def test_benchmarks_by_examples() -> None:
    shares = task_shares(
        mixture(NIV2=(0.5, "examples"), FLAN=(0.3, "examples"), replay=(0.2, "examples")), TASKS
    )
    # Within NIV2 the capped sizes decide: 4096 to 1024.
    assert shares.tolist() == pytest.approx([0.4, 0.1, 0.3, 0.2])


def test_replay_by_tokens_beside_examples() -> None:
    asked = mixture(NIV2=(0.57, "examples"), FLAN=(0.38, "examples"), replay=(0.05, "tokens"))
    assert shares_of(asked, "tokens")["replay"] == pytest.approx(0.05)
    drawn = shares_of(asked, "examples")
    assert drawn["NIV2"] / drawn["FLAN"] == pytest.approx(57 / 38)
    # 5 % of the examples would have been far more of the tokens: the unit matters.
    by_examples = mixture(NIV2=(0.57, "examples"), FLAN=(0.38, "examples"), replay=(0.05, "examples"))
    assert shares_of(by_examples, "tokens")["replay"] > 0.25


def test_worked_example_of_the_module_head() -> None:
    tasks = [
        TaskSize("NIV2__a__b", "NIV2", 10, 100.0, 9.0),
        TaskSize("replay__a__b", "replay", 10, 1000.0, 999.0),
    ]
    shares = task_shares(mixture(NIV2=(0.95, "examples"), replay=(0.05, "tokens")), tasks)
    assert shares.tolist() == pytest.approx([0.99476, 0.00524], abs=1e-5)


@pytest.mark.parametrize("unit", ["tokens", "target_tokens"])
def test_one_unit_for_all(unit: str) -> None:
    asked = mixture(NIV2=(0.6, unit), FLAN=(0.3, unit), replay=(0.1, unit))
    assert shares_of(asked, unit) == pytest.approx({"NIV2": 0.6, "FLAN": 0.3, "replay": 0.1})


def test_zero_leaves_a_benchmark_out() -> None:
    shares = task_shares(mixture(NIV2=(1.0, "examples"), FLAN=(0, "tokens"), replay=(0, "examples")), TASKS)
    assert shares.tolist() == pytest.approx([0.8, 0.2, 0, 0])


def test_benchmarks_must_match_the_corpus() -> None:
    with pytest.raises(ValueError, match="benchmark 'NIV3', the corpus lacks it; near: NIV2"):
        task_shares(mixture(NIV3=(1.0, "examples")), TASKS)
    with pytest.raises(ValueError, match="has benchmark 'replay', the mixture gives it no proportion"):
        task_shares(mixture(NIV2=(0.5, "examples"), FLAN=(0.5, "examples")), TASKS)
    nothing = TaskSize("replay__c__all", "replay", documents=3, tokens=0.0, target_tokens=0.0)
    with pytest.raises(ValueError, match="'replay' has no usable document"):
        task_shares(
            mixture(NIV2=(0.5, "tokens"), FLAN=(0.4, "tokens"), replay=(0.1, "tokens")), [*TASKS[:3], nothing]
        )


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder(np.array([1 / 3, 1 / 3, 1 / 3]), 4).tolist() == [2, 1, 1]
    assert largest_remainder(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]  # 3.5 2.1 1.4
    assert largest_remainder(np.array([0.0, 1.0]), 3).tolist() == [0, 3]


@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=50), total=st.integers(0, 10_000))
def test_quotas_sum_up_and_are_within_one(weights: list[float], total: int) -> None:
    shares = np.array(weights) / sum(weights)
    quotas = largest_remainder(shares, total)
    assert quotas.sum() == total
    assert (np.abs(quotas - shares * total) < 1 + 1e-6).all()


# Ten slots a draw, so that 4,000 slots are 400 draws.
SMALL = TaskSize("A__x__small", "A", documents=100, tokens=11.0, target_tokens=1.0)
LARGE = TaskSize("A__x__large", "A", documents=1000, tokens=11.0, target_tokens=1.0)
OTHER = TaskSize("B__x__other", "B", documents=50, tokens=11.0, target_tokens=1.0)


def test_a_bounded_task_leaves_its_draws_to_its_benchmark() -> None:
    blend = blend_tasks(Mixture(100, max_epochs=1), [SMALL, LARGE], 4000)
    # Equal under the cap, 200 draws each; but the small one has 100 documents.
    assert blend.shares_K.tolist() == pytest.approx([0.25, 0.75])
    assert (blend.draws, blend.most_K.tolist(), blend.shortfalls) == (400, [100, 1000], ())
    shares = {"A": Proportion(0.9, "examples", max_epochs=1), "B": Proportion(0.1, "examples")}
    blend = blend_tasks(Mixture(100, shares), [SMALL, LARGE, OTHER], 4000)
    assert blend.shares_K.tolist() == pytest.approx([0.25, 0.65, 0.1])
    # The bound of a benchmark replaces that of the mixture.
    assert Mixture(100, shares, max_epochs=7).epoch_bound("A") == 1
    assert Mixture(100, shares, max_epochs=7).epoch_bound("B") == 7


def test_bounds_and_tokens_together() -> None:
    long = TaskSize("R__x__long", "R", documents=1, tokens=1001.0, target_tokens=1000.0)
    short = TaskSize("R__x__short", "R", documents=1000, tokens=101.0, target_tokens=100.0)
    mixture = Mixture(10, {"A": Proportion(0.5, "examples"), "R": Proportion(0.5, "tokens", max_epochs=2)})
    blend = blend_tasks(mixture, [LARGE, long, short], 40_000)
    draws = blend.shares_K * blend.draws
    # Under the cap alone the long text would come 8 times; it comes twice and the short ones fill up.
    assert draws[1] == pytest.approx(2, rel=1e-3)
    assert draws[0] * 11 == pytest.approx(draws[1] * 1001 + draws[2] * 101, rel=1e-6)
    assert draws @ [10, 1000, 100] == pytest.approx(40_000, rel=1e-3)


def test_what_cannot_be_had_is_said() -> None:
    half = Proportion(0.5, "examples")
    bounded = replace(half, max_epochs=2)
    blend = blend_tasks(Mixture(4096, {"A": half, "B": bounded}), [LARGE, OTHER], 4000)
    (message,) = blend.shortfalls
    # B has 50 documents, twice each; A fills the rest of the rows, so that more is asked of B in turn.
    assert "benchmark 'B' is to be 0.5 of the examples, 300 for these rows; max_epochs allows 100" in message
    assert "lower the proportion or ask for fewer rows" in message
    blend = blend_tasks(Mixture(4096, max_epochs=2), [SMALL, OTHER], 4000)
    (message,) = blend.shortfalls
    assert "the rows have 4,000 slots, max_epochs allows documents for 3,000: raise it" in message


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.integers(1, 3000), min_size=4, max_size=12),
    rows=st.integers(1, 50),
    bound=st.floats(0.5, 20),
    share=st.floats(0.01, 0.99),
)
# The bounds move draws to longer documents: fewer are needed than without bounds.
@example(documents=[232, 8, 646, 1], rows=5, bound=0.5, share=0.01)
def test_bounds_hold_and_proportions_with_them(
    documents: list[int], rows: int, bound: float, share: float
) -> None:
    tasks = [
        TaskSize(f"{'AB'[k % 2]}__x__{k}", "AB"[k % 2], count, 20.0 + 3 * k, 1.0)
        for k, count in enumerate(documents)
    ]
    shares = {"A": Proportion(1 - share, "examples"), "B": Proportion(share, "tokens")}
    blend = blend_tasks(Mixture(500, shares, max_epochs=bound), tasks, rows * 2048.0)
    draws = blend.shares_K * blend.draws
    # `draws` is rounded to a whole number.
    assert (draws <= blend.most_K * (1 + 1 / blend.draws) + 1e-6).all()
    if not blend.shortfalls:
        tokens = draws * [task.tokens for task in tasks]
        assert tokens[1::2].sum() / tokens.sum() == pytest.approx(share, rel=1e-6)
        assert draws @ [task.slots for task in tasks] == pytest.approx(
            rows * 2048, abs=0.6 * max(task.slots for task in tasks)
        )


def test_absent_benchmarks_leave_their_part_to_the_others() -> None:
    asked = mixture(
        NIV2=(0.3, "examples"), T5=(0.5, "examples"), FLAN=(0.1, "examples"), replay=(0.1, "tokens")
    )
    asked = replace(asked, skip_absent=True)
    shares = task_shares(asked, TASKS)
    assert (shares[0] + shares[1]) / shares[2] == pytest.approx(3)
    assert shares_of(asked, "tokens")["replay"] == pytest.approx(0.1)
    assert absent_benchmarks(asked, TASKS) == ["T5"]
    # Nothing is asked of a benchmark with 0, so it need not be there.
    unused = mixture(NIV2=(1, "examples"), FLAN=(0, "examples"), replay=(0, "tokens"), T5=(0, "examples"))
    assert task_shares(unused, TASKS).tolist() == pytest.approx([0.8, 0.2, 0, 0])


def test_expected_values() -> None:
    # 5,722 capped documents; the mean draw takes this many slots.
    slots = (4096 * 199 + 1024 * 49 + 512 * 99 + 90 * 999) * 10
    blend = blend_tasks(Mixture(4096), TASKS, slots)
    long, _, _, replay = explain_tasks(Mixture(4096), blend, TASKS)
    assert blend.draws == 57220
    assert (long.documents, long.effective) == (6000, 4096)
    assert long.epochs == pytest.approx(40960 / 6000)
    assert (replay.draws, replay.tokens) == (pytest.approx(900), pytest.approx(900_000))
    assert replay.target_tokens == pytest.approx(900 * 999)
    flan, niv2, _ = explain_benchmarks(explain_tasks(Mixture(4096), blend, TASKS), TASKS)
    assert (flan.name, niv2.name) == ("FLAN", "NIV2")
    assert (niv2.documents, niv2.effective, niv2.draws) == (7024, 5120, pytest.approx(51200))
    assert niv2.tokens == pytest.approx(40960 * 200 + 10240 * 50)
