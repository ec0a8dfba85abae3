"""Everything before the first step: data opened and checked, model built and filled, isolation proven.

What enters: a checked `Config` and this rank's place. What leaves: a `Run`. Whatever a user can get wrong is
found here, on every rank, before the model is built, and said once (`agree.py`).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_iml.checkpoint.load import check_share_of_files, load_run, newest_checkpoint
from megatron_iml.checkpoint.record import RunState, check_same_shape, read_record
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.checkpoint.weights import check_weights, fill_weights
from megatron_iml.config import Config, micro_batches_per_step, parameter_count, rows_per_step, save_config
from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.folder import Plan
from megatron_iml.data.rows.loader import Loader
from megatron_iml.model.initialise import initialise
from megatron_iml.model.ops import choose_ops
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
    tidied: list[str]
    """What was done about an earlier run that died."""
    changed: list[str]
    """What the configuration says otherwise than that of the checkpoint, as `section.field: old -> new`."""

    def introduction(self) -> Iterator[str]:
        """The lines a run opens with."""
        layout, model = self.engine.layout, self.config.model
        parameters = parameter_count(model)
        yield f"OPT {model.num_layers} layers x {model.hidden_size}, {parameters:,} parameters, {self.start}"
        yield (
            f"world {layout.world_size}: tensor {layout.tensor_size} x pipeline {layout.pipeline_size} x "
            f"data {layout.data_size} on {layout.device.type}, {self.config.training.precision}; "
            f"{rows_per_step(self.config)} rows of {self.config.data.row_length} a step, "
            f"{micro_batches_per_step(self.config, layout.world_size)} micro-batches a rank"
        )
        if self.state.step:
            yield f"resumed after step {self.state.step}"
        # Allowed, most of it, but not by accident: the schedule and the batch follow the new values.
        yield from (f"changed since then: {change}" for change in self.changed)
        if self.state.step >= self.config.training.steps:
            yield f"nothing to do: all {self.config.training.steps} steps are done"
        yield from self.tidied
        if self.config.training.self_test:
            yield "self-test passed: no document sees another on this layout"


def prepare(config: Config, layout: Layout) -> Run:
    """Open, build, fill and prove."""
    directory = Path(config.training.output_directory)
    train_loader, validation_loaders = on_every_rank(lambda: _open_data(config))
    plan = train_loader.plan
    model = config.model
    on_every_rank(lambda: choose_ops(model.kernel_backend, model.attention_backend, layout.device))
    # Before the model: it says whether this is a new run, and whether it may be one.
    store = CheckpointStore(directory / "checkpoints", config.checkpoint)
    newest = newest_checkpoint(store.directory)
    on_every_rank(lambda: _check_start(config, newest, plan))
    # Every byte is read once, by some rank, before a damaged file can end a load halfway.
    if newest is not None:
        on_every_rank(lambda: check_share_of_files(newest, read_record(newest), weights_only=False))
    # From here on ranks wait for one another in collectives, so nothing below is a user's to get wrong.
    engine = build_engine(config, layout)
    state, start = _fill(engine, newest, train_loader)
    changed = changed_fields(read_record(newest).config, asdict(config)) if newest is not None else []
    # After the weights: what uninitialised ones give proves nothing.
    if config.training.self_test:
        run_self_test(engine)
    # Last, so that a refused run leaves nothing behind.
    if layout.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, directory / "config.yaml")
    # Without an interval the one save comes at the end, where nobody waits for it to train on.
    if config.checkpoint.save_interval:
        store.reserve(engine)
    tidied = store.tidy()
    return Run(
        config, directory, engine, store, train_loader, validation_loaders, state, start, tidied, changed
    )


def changed_fields(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """`section.field: old -> new` of every field that two resolved configurations do not share."""
    # A record went through JSON, where tuples are lists.
    after = json.loads(json.dumps(after))
    return [
        f"{section}.{field}: {before.get(section, {}).get(field)} -> {value}"
        for section, fields in after.items()
        for field, value in fields.items()
        if value != before.get(section, {}).get(field)
    ]


def _open_data(config: Config) -> tuple[Loader, dict[str, Loader]]:
    data = config.data
    assert data.train_corpus and data.train_plan, "check_config asks for both"
    train_loader = open_loader(Path(data.train_corpus), Path(data.train_plan), config)
    validation = {}
    for level, plan in data.validation_plans.items():
        try:
            validation[level] = open_loader(Path(data.validation_corpus or ""), Path(plan), config)
        except FileNotFoundError as missing:
            # A bench may have no task of a level, and then there is no plan to be made.
            raise FileNotFoundError(
                f"data.validation_plans.{level}: {missing}, or leave the level out"
            ) from None
    return train_loader, validation


def open_loader(corpus_folder: Path, plan_folder: Path, config: Config) -> Loader:
    """Map a corpus and its plan, and check both against the model."""
    # Mapped, not read: every rank may open them.
    corpus, plan = Corpus.open(corpus_folder), Plan.open(plan_folder)
    # Rows a step, and the shape of messages between stages, follow from the configured length.
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
    if plan.shares_prefixes and config.model.attention_backend == "flash":
        raise ValueError(
            f"model.attention_backend: got flash with plan {plan_folder}, whose documents share prefixes; "
            "allowed: triton or reference; change it, or build the plan without --share-prefixes"
        )
    # An id beyond the table is an illegal access on a GPU, far from its cause.
    if corpus.padded_vocab_size != config.model.vocab_size:
        raise ValueError(
            f"corpus {corpus_folder} was written with a vocabulary of {corpus.padded_vocab_size} ids "
            f"(padded), model.vocab_size is {config.model.vocab_size}: set "
            f"model.vocab_size={corpus.padded_vocab_size}, or build the corpus with the model's tokenizer"
        )
    return Loader(corpus, plan)


def _check_start(config: Config, newest: Path | None, plan: Plan) -> None:
    """Refuse weights that do not fit the model, and a checkpoint that this run cannot go on from."""
    steps, rows = config.training.steps, rows_per_step(config)
    if newest is None:
        if plan.num_rows < steps * rows:
            raise ValueError(
                f"data.train_plan {config.data.train_plan} has {plan.num_rows} rows; {steps} steps of {rows} "
                f"rows need {steps * rows}: build a plan with --rows {steps * rows}, or lower training.steps"
            )
        if config.checkpoint.initial_weights is not None:
            check_weights(Path(config.checkpoint.initial_weights), config.model)
        return
    if not config.checkpoint.resume:
        raise ValueError(
            f"{newest.parent} holds complete checkpoints, the newest {newest.name}, but checkpoint.resume is "
            "false: name another training.output_directory, or resume"
        )
    record = read_record(newest)
    check_same_shape(newest, record.config["model"], config.model)
    if not record.has_optimizer:
        raise ValueError(
            f"checkpoint {newest} holds weights only, and no run can go on from it: move it away and name "
            "it in checkpoint.initial_weights"
        )
    state = record.state
    # `rows_consumed` counts rows of that plan; in another one the same number means other documents.
    if state.plan_fingerprint != plan.fingerprint:
        raise ValueError(
            f"checkpoint {newest} was trained on plan {state.plan_fingerprint}, data.train_plan is "
            f"{plan.fingerprint}: name the same plan, or start afresh in another training.output_directory"
        )
    if state.step > steps:
        raise ValueError(
            f"training.steps: got {steps}, but checkpoint {newest} has taken {state.step} steps; allowed: "
            f"{state.step} or more; raise training.steps, or name another training.output_directory"
        )
    # A batch that changed since the checkpoint was saved moves the end.
    needed = state.rows_consumed + (steps - state.step) * rows
    if needed > plan.num_rows:
        raise ValueError(
            f"data.train_plan {config.data.train_plan} has {plan.num_rows} rows; {state.rows_consumed} are "
            f"consumed and {steps - state.step} steps of {rows} rows are left, {needed} in "
            "all: lower training.steps or training.global_batch_positions"
        )


def _fill(engine: Engine, newest: Path | None, train_loader: Loader) -> tuple[RunState, str]:
    """Weights and state: from the newest checkpoint, from initial weights, or random as the config says."""
    config = engine.config
    if newest is not None:
        return load_run(newest, engine), f"from {newest}"
    if config.checkpoint.initial_weights is None:
        initialise(engine.chunks, config.model, config.training.seed, engine.layout)
        start = "random weights"
    else:
        folder = Path(config.checkpoint.initial_weights)
        fill_weights(folder, engine.chunks, config.model, engine.layout)
        start = f"from {folder}"
    # The fp32 master weights were copied from the model before it was filled.
    engine.optimizer.reload_model_params()
    plan, corpus = train_loader.plan, train_loader.corpus
    return RunState(0, 0, plan.fingerprint, plan.corpus_fingerprint, corpus.tokenizer_sha256), start
