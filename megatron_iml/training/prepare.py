"""Everything before the first step: data opened and checked, model built and filled, isolation proven.

What enters: a checked `Config` and this rank's place. What leaves: a `Run`. Whatever a user can get wrong is
found here, on every rank, and said once (`agree.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_iml.checkpoint.store import (
    CheckpointStore,
    RunState,
    complete_checkpoints,
    load_run,
)
from megatron_iml.checkpoint.weights import fill_weights
from megatron_iml.config import Config, micro_batches_per_step, parameter_count, rows_per_step, save_config
from megatron_iml.data.corpus import Corpus
from megatron_iml.data.loader import Loader
from megatron_iml.data.plan import Plan
from megatron_iml.model.initialise import initialise
from megatron_iml.parallel.groups import Layout

from .agree import on_every_rank
from .engine import Engine, build_engine
from .self_test import run_self_test


@dataclass(frozen=True)
class Run:
    """A run that can take its next step."""

    config: Config
    directory: Path
    engine: Engine
    store: CheckpointStore
    train_loader: Loader
    validation_loaders: dict[str, Loader]
    state: RunState
    start: str
    """Where the weights came from."""

    def introduction(self) -> Iterator[str]:
        """The lines a run opens with."""
        layout, model = self.engine.layout, self.config.model
        parameters = parameter_count(model)
        yield f"OPT {model.num_layers} layers x {model.hidden_size}, {parameters:,} parameters, {self.start}"
        yield (
            f"world {layout.world_size}: tensor {layout.tensor_size} x pipeline {layout.pipeline_size} x "
            "data "
            f"{layout.data_size} on {layout.device.type}, {self.config.training.precision}; "
            f"{rows_per_step(self.config)} rows of {self.config.data.row_length} a step, "
            f"{micro_batches_per_step(self.config, layout.world_size)} micro-batches a rank"
        )
        if self.state.step:
            yield f"resumed after step {self.state.step}"
        if self.config.training.self_test:
            yield "self-test passed: no document sees another on this layout"


def prepare(config: Config, layout: Layout) -> Run:
    """Open, build, fill and prove."""
    directory = Path(config.training.output_directory)
    train_loader, validation_loaders = on_every_rank(lambda: _open_data(config))
    engine = build_engine(config, layout)
    store = CheckpointStore(
        directory / "checkpoints", config.checkpoint.keep_last, config.checkpoint.asynchronous
    )
    state, start = on_every_rank(lambda: _fill(engine, store.directory, train_loader.plan.fingerprint))
    if config.training.self_test:
        run_self_test(engine)
    if layout.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, directory / "config.yaml")
    return Run(config, directory, engine, store, train_loader, validation_loaders, state, start)


def _open_data(config: Config) -> tuple[Loader, dict[str, Loader]]:
    data, needed = config.data, rows_per_step(config) * config.training.steps
    assert data.train_corpus and data.train_plan, "check_config asks for both"
    train_loader = open_loader(Path(data.train_corpus), Path(data.train_plan), config)
    if train_loader.plan.num_rows < needed:
        raise ValueError(
            f"data.train_plan {data.train_plan} has {train_loader.plan.num_rows} rows; "
            f"{config.training.steps} steps of "
            f"{rows_per_step(config)} rows need {needed}: build a plan with --rows {needed}, or lower "
            "training.steps"
        )
    validation = {
        level: open_loader(Path(data.validation_corpus or ""), Path(plan), config)
        for level, plan in data.validation_plans.items()
    }
    return train_loader, validation


def open_loader(corpus_folder: Path, plan_folder: Path, config: Config) -> Loader:
    """Map a corpus and its plan, and check both against the model."""
    corpus, plan = Corpus.open(corpus_folder), Plan.open(plan_folder)
    if plan.row_length != config.data.row_length:
        raise ValueError(
            f"plan {plan_folder} has rows of {plan.row_length} positions, data.row_length is "
            f"{config.data.row_length}: set data.row_length={plan.row_length} or build the plan again"
        )
    if plan.max_positions > config.model.max_position_embeddings:
        raise ValueError(
            f"plan {plan_folder} holds documents of up to {plan.max_positions} positions, "
            f"model.max_position_embeddings is {config.model.max_position_embeddings}: build the plan with "
            f"--max-positions {config.model.max_position_embeddings}"
        )
    if corpus.padded_vocab_size != config.model.vocab_size:
        raise ValueError(
            f"corpus {corpus_folder} was written with a vocabulary of {corpus.padded_vocab_size} ids "
            "(padded), "
            f"model.vocab_size is {config.model.vocab_size}: set "
            f"model.vocab_size={corpus.padded_vocab_size}, "
            "or build the corpus with the model's tokenizer"
        )
    return Loader(corpus, plan)


def _fill(engine: Engine, checkpoints: Path, plan_fingerprint: str) -> tuple[RunState, str]:
    """Weights and state: from the newest checkpoint, from initial weights, or random as the config says."""
    config = engine.config
    complete = complete_checkpoints(checkpoints)
    if config.checkpoint.resume and complete:
        state = load_run(complete[-1], engine)
        if state.plan_fingerprint != plan_fingerprint:
            raise ValueError(
                f"checkpoint {complete[-1]} was trained on plan {state.plan_fingerprint}, data.train_plan is "
                f"{plan_fingerprint}: name the same plan, or start afresh in another "
                "training.output_directory"
            )
        return state, f"from {complete[-1]}"
    if complete:
        raise ValueError(
            f"{checkpoints} holds {len(complete)} complete checkpoints but checkpoint.resume is false: "
            "name another training.output_directory, or resume"
        )
    if config.checkpoint.initial_weights is None:
        initialise(engine.chunks, config.model, config.training.seed, engine.layout)
        start = "random weights"
    else:
        folder = Path(config.checkpoint.initial_weights)
        fill_weights(folder, engine.chunks, config.model, engine.layout)
        start = f"from {folder}"
    engine.optimizer.reload_model_params()
    return RunState(0, 0, plan_fingerprint), start
