"""Proof at start-up, on the layout that will train, that no document sees another.

One row holds plain documents, a trunk with two branches, and padding. It runs forward and backward; then one
document's tokens change and it runs again. Every loss of a document that does not descend from the changed
one, and every gradient with respect to its embeddings, must be the same bits as before; the changed
document's own losses must differ, or the test proves nothing. Dropout stays on: masks do not depend on
tokens.

    documents 0 1 2 | trunk 3 with branches 4, 5 | padding      change 1: only 1 may differ
                                                                change 3 in its shared prefix: 3, 4 and 5 may
                                                                differ
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_iml.data.loader import Piece, Row, assemble_row
from megatron_iml.model.row import to_device

from .engine import Engine

TRUNK = 3
BRANCHES = (4, 5)


@dataclass(frozen=True)
class Trace:
    """What one run of the row left on this rank: losses on the last stage, embedding gradients on the
    first."""

    losses_M: Tensor | None
    gradients_TF: Tensor | None


def run_self_test(engine: Engine) -> None:
    """Raise RuntimeError, naming the ranks, if a document reaches another on this layout."""
    model = engine.config.model
    pieces = sample_documents(engine.config.data.row_length, model.vocab_size, model.max_position_embeddings)
    before = _trace(engine, _row(engine, pieces))
    problems = []
    for changed, may_differ in ((1, {1}), (TRUNK, {TRUNK, *BRANCHES}), (BRANCHES[0], {BRANCHES[0]})):
        after = _trace(engine, _row(engine, _change(pieces, changed, model.vocab_size)))
        problems += _compare(engine, pieces, before, after, changed, may_differ)
    # What the test left in the buffers would be added to the first step.
    engine.zero_gradients()
    # Gathered, because a leak shows on one stage only and all must stop.
    everyone: list[list[str]] = [[] for _ in range(engine.layout.world_size)]
    dist.all_gather_object(everyone, problems)
    if any(everyone):
        raise RuntimeError(
            "self-test: documents are not isolated on this layout\n"
            + "\n".join(f"  rank {rank}: {text}" for rank, texts in enumerate(everyone) for text in texts)
            + "\ntraining would mix documents; do not go on with this attention backend and layout"
        )


def sample_documents(row_length: int, vocab_size: int, max_positions: int) -> list[Piece]:
    """Six documents of odd lengths that leave some padding; every token after the first is a target or
    source."""
    # The same documents on every rank, without a broadcast; ids from 4 on are no special tokens.
    rng = np.random.default_rng(0)
    # The longest takes 3 units; rows may be longer than any document can be.
    unit = max(min(row_length // 16, max_positions // 3), 3)
    lengths = [unit, 2 * unit + 1, 3, 3 * unit, 2 * unit, 2 * unit - 1]
    documents = [rng.integers(4, vocab_size, length).astype(np.int32) for length in lengths]
    shared = unit
    pieces = [Piece(tokens, source_length=1 + index % 2) for index, tokens in enumerate(documents)]
    for branch in BRANCHES:
        tokens = np.concatenate([documents[TRUNK][:shared], documents[branch][shared:]])
        pieces[branch] = Piece(tokens, source_length=shared + 1, trunk=TRUNK, shared=shared)
    return pieces


def _change(pieces: list[Piece], changed: int, vocab_size: int) -> list[Piece]:
    """Change one token of a document: of a trunk, one inside the shared prefix, which the branches then carry
    too."""
    place = pieces[changed].shared
    token = 4 + (int(pieces[changed].tokens[place]) - 3) % (vocab_size - 4)
    result = list(pieces)
    for index, piece in enumerate(pieces):
        if index == changed or (piece.trunk == changed and place < piece.shared):
            tokens = piece.tokens.copy()
            tokens[place] = token
            result[index] = Piece(tokens, piece.source_length, piece.trunk, piece.shared)
    return result


def _row(engine: Engine, pieces: list[Piece]) -> Row:
    return assemble_row(pieces, engine.config.data.row_length, index=0)


def _trace(engine: Engine, row: Row) -> Trace:
    """Run the row through the real schedule, once per pipeline stage so that interleaving has its
    micro-batches."""
    layout = engine.layout
    gradients: list[Tensor] = []

    def keep_gradient(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A clone: the gradient's memory may be reused once the backward is through.
        output.register_hook(lambda gradient: gradients.append(gradient.clone()))

    hooks = [engine.chunks[0].embedding.register_forward_hook(keep_gradient)] if layout.is_first_stage else []
    engine.zero_gradients()
    batches = [[to_device(row, layout.device)] * layout.pipeline_size for _ in range(layout.virtual_size)]
    losses = engine.run([iter(chunk) for chunk in batches], layout.pipeline_size, forward_only=False)
    # Left in place it would keep every later gradient alive.
    for hook in hooks:
        hook.remove()
    return Trace(
        losses_M=losses[0] if layout.is_last_stage else None,
        gradients_TF=gradients[0][:, 0] if layout.is_first_stage else None,
    )


def _compare(
    engine: Engine, pieces: list[Piece], before: Trace, after: Trace, changed: int, may_differ: set[int]
) -> list[str]:
    """Describe every violation that this rank can see."""
    problems = []
    slot_owner_T = _slot_owners(pieces, engine.config.data.row_length)
    if before.losses_M is not None and after.losses_M is not None:
        owner_M = np.concatenate([np.full(len(p.tokens) - p.source_length, i) for i, p in enumerate(pieces)])
        differs_M = (before.losses_M != after.losses_M).cpu().numpy() | ~np.isfinite(
            after.losses_M.cpu().numpy()
        )
        leaked = sorted(set(owner_M[differs_M].tolist()) - may_differ)
        if leaked:
            problems.append(f"losses of documents {leaked} changed with document {changed}")
        if changed not in owner_M[differs_M]:
            problems.append(f"losses of document {changed} did not change with its own tokens")
    if before.gradients_TF is not None and after.gradients_TF is not None:
        local = slice(0, None)
        if engine.config.parallel.sequence_parallel:
            slots = before.gradients_TF.shape[0]
            local = slice(engine.layout.tensor_rank * slots, (engine.layout.tensor_rank + 1) * slots)
        differs_T = (before.gradients_TF != after.gradients_TF).any(dim=1).cpu().numpy()
        leaked = sorted(set(slot_owner_T[local][differs_T].tolist()) - _with_trunks(pieces, may_differ))
        if leaked:
            problems.append(f"embedding gradients of documents {leaked} changed with document {changed}")
    return problems


def _with_trunks(pieces: list[Piece], documents: set[int]) -> set[int]:
    """A trunk's slots get gradients from its branches: they may change with them."""
    return documents | {pieces[document].trunk for document in documents if pieces[document].trunk >= 0}


def _slot_owners(pieces: list[Piece], row_length: int) -> NDArray[np.int64]:
    """Document of every slot; -1 for padding."""
    owners = np.full(row_length, -1, dtype=np.int64)
    slots = [len(piece.tokens) - 1 - piece.shared for piece in pieces]
    owners[: sum(slots)] = np.repeat(np.arange(len(pieces)), slots)
    return owners
