"""Every layout to one canonical form and back: weights, fp32 weights and Adam moments bit for bit.

The canonical form is what a single rank saves, which shards nothing. Its state is loaded under each layout
over other weights, saved from there, and compared tensor by tensor as it lies in the files. Interleaving cuts
each of two stages into two chunks. Of the layouts of {TP1, TP2, TP4} x {PP1, PP2, interleaved} x {DP1, DP2}
those of 16 ranks are left out: the pool has 8.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import runs
import torch
from megatron.core import dist_checkpointing
from pool import Pool
from torch import Tensor

from megatron_iml.checkpoint.load import load_run
from megatron_iml.config import Config, ParallelConfig
from megatron_iml.model.initialise import initialise

STEP = 2
LAYOUTS = {
    f"tp{tensor}-pp{pipeline}{'-interleaved' if chunks else ''}-dp{data}": (
        tensor * pipeline * data,
        ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=chunks,
        ),
    )
    for tensor in (1, 2, 4)
    for pipeline, chunks in ((1, None), (2, None), (2, 2))
    for data in (1, 2)
}
QUICK = ("tp2-pp2-interleaved-dp1", "tp4-pp1-dp1")


def train_and_save(config: Config, folder: Path) -> dict[str, Tensor]:
    """The canonical state: two steps of a single rank."""
    engine = runs.fresh_engine(config)
    runs.take_steps(engine, range(STEP))
    return read_tensors(runs.save(engine, folder, STEP))


def load_and_save(config: Config, source: Path, folder: Path) -> dict[str, Tensor]:
    """What a layout makes of another's state, before any step."""
    engine = runs.fresh_engine(config)
    # Whatever the load leaves untouched would be wrong, not right by chance.
    initialise(engine.chunks, config.model, 99, engine.layout)
    engine.optimizer.reload_model_params()
    load_run(source / f"iter_{STEP:07d}", engine)
    return read_tensors(runs.save(engine, folder, STEP))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, as the files have it."""
    tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


class Canonical(NamedTuple):
    """What a single rank saved."""

    folder: Path
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def canonical(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Canonical:
    folder = tmp_path_factory.mktemp("canonical")
    return Canonical(folder, pool.run(train_and_save, 1, runs.run_config("bf16"), folder)[0])


def assert_there_and_back(pool: Pool, canonical: Canonical, folder: Path, name: str) -> None:
    ranks, parallel = LAYOUTS[name]
    config, alone = runs.run_config("bf16", parallel), runs.run_config("bf16")
    there = pool.run(load_and_save, ranks, config, canonical.folder, folder / "there")[0]
    back = pool.run(load_and_save, 1, alone, folder / "there", folder / "back")[0]
    expected = canonical.tensors
    moments = [key for key in expected if key.startswith("optimizer.state.exp_avg_sq.")]
    assert moments and all(expected[key].any() for key in moments), "a state of zeros would prove nothing"
    for place, state in (("there", there), ("back", back)):
        assert state.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(state[key], expected[key])]
        assert not different, f"{place}: {len(different)} of {len(expected)} differ, first {different[0]}"


@pytest.mark.parametrize("name", QUICK)
def test_to_a_layout_and_back(pool: Pool, canonical: Canonical, tmp_path: Path, name: str) -> None:
    assert_there_and_back(pool, canonical, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in QUICK and LAYOUTS[name][0] <= 8])
def test_to_more_layouts_and_back(pool: Pool, canonical: Canonical, tmp_path: Path, name: str) -> None:
    assert_there_and_back(pool, canonical, tmp_path, name)
