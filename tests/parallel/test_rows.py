"""Dealing rows: equal counts, every row once, near balance, and nothing but the costs decides."""

from pathlib import Path

import numpy as np
import pytest
from corpora import plan_of, write_lengths
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.config import ModelConfig
from megatron_iml.config.sizes import OPT_SIZES
from megatron_iml.data.plan.mixture import Mixture
from megatron_iml.data.plan.packing import PackingConfig
from megatron_iml.parallel.rows import deal_rows
from megatron_iml.training.flops import row_flops

LENGTHS = Path(__file__).parents[2].parent / "shared" / "lengths" / "doc_lengths_mixture.npz"


def test_the_worked_example() -> None:
    assert deal_rows([9, 1, 1, 5], 2) == [[0, 2], [1, 3]]


def test_swaps_even_out_what_greedy_choice_left() -> None:
    dealt = deal_rows([8, 7, 6, 5, 4, 0], 2)
    assert [sum([8, 7, 6, 5, 4, 0][row] for row in rows) for rows in dealt] == [15, 15]


def test_equal_costs_go_round_and_one_rank_gets_all() -> None:
    assert deal_rows([1.0] * 6, 3) == [[0, 3], [1, 4], [2, 5]]
    assert deal_rows([3.0, 1.0, 2.0], 1) == [[0, 1, 2]]


@settings(max_examples=200, deadline=None)
@given(costs=st.lists(st.floats(0, 1e15), min_size=1, max_size=12), ranks=st.sampled_from([1, 2, 3, 4, 8]))
def test_every_row_is_dealt_once_in_order_and_evenly(costs: list[float], ranks: int) -> None:
    costs = costs * ranks
    dealt = deal_rows(costs, ranks)
    assert dealt == deal_rows(list(costs), ranks)
    assert {len(rows) for rows in dealt} == {len(costs) // ranks}
    assert all(rows == sorted(rows) for rows in dealt)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(costs)))


def test_balance_on_rows_of_real_spread() -> None:
    # Useful FLOPs of full rows differ by a third or so; 32 rows a rank, as a real step has.
    rng = np.random.default_rng(0)
    for ranks in (2, 4, 8, 16):
        costs = rng.uniform(0.8, 1.2, 32 * ranks)
        loads = [costs[rows].sum() for rows in deal_rows(costs.tolist(), ranks)]
        in_order = costs.reshape(ranks, 32).sum(1)
        assert max(loads) / np.mean(loads) < 1.002
        assert max(loads) / np.mean(loads) < max(in_order) / np.mean(in_order)


@pytest.mark.skipif(not LENGTHS.is_file(), reason=f"real document lengths are not at {LENGTHS}")
@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("rows_per_rank", [4, 5, 6, 8])
def test_balance_on_real_documents(
    real_rows: list[dict[str, np.ndarray]], ranks: int, rows_per_rank: int
) -> None:
    rows = rows_per_rank * ranks
    for plan in real_rows:
        for costs in plan.values():
            for first in range(0, len(costs) - rows + 1, rows)[:300]:
                step = costs[first : first + rows]
                loads = [step[dealt].sum() for dealt in deal_rows(step.tolist(), ranks)]
                assert max(loads) / np.mean(loads) <= 1.01


@pytest.fixture(scope="module")
def real_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    """Useful FLOPs of rows of 2,048 slots with 200,000 real documents, by model size, of plans by seed."""
    stored = np.load(LENGTHS)
    folder = tmp_path_factory.mktemp("rows")
    corpus = write_lengths(folder / "corpus", {"A__b__c": (stored["prompt_len"], stored["target_len"])})
    models = {
        name: ModelConfig(
            num_layers=size.num_layers,
            hidden_size=size.hidden_size,
            ffn_hidden_size=4 * size.hidden_size,
            num_attention_heads=size.num_attention_heads,
        )
        for name, size in OPT_SIZES.items()
        # The smaller a model, the more its rows differ.
        if name in ("opt-125m", "opt-1.3b")
    }
    plans = []
    for seed in (1, 2):
        config = PackingConfig(Mixture(), row_length=2048, rows=None, seed=seed)
        plan = plan_of(corpus, config, folder / f"plan{seed}")
        sums = np.stack([plan.slots_R, plan.targets_R, plan.pairs_R]).astype(float)
        plans.append({name: row_flops(model, *sums) for name, model in models.items()})
    return plans


def test_rows_as_they_lie_where_swaps_do_not_help() -> None:
    # Heaviest first ends at 41, and no single swap helps; the plan had found every row its company.
    costs = [9, 9, 10, 12, 9, 10, 10, 11, 8, 8, 9, 15]
    assert [sum(costs[row] for row in rows) for rows in deal_rows(costs, 3)] == [40, 40, 40]


def test_rows_that_do_not_divide_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="5 rows cannot be dealt evenly to 2 ranks"):
        deal_rows([1.0] * 5, 2)
