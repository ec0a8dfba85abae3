"""Proof at start-up, on the layout that will train, that it computes what the configuration says.

Weights first: every one exists, and its copies are the same bits (`copies.py`). Then isolation: one row holds
plain documents, a trunk with two branches, and padding. It runs forward and backward; then one document's
tokens change and it runs again. Every loss of a document that does not descend from the changed one, and
every gradient with respect to its embeddings, must be the same bits as before; the changed document's own
losses must differ, or the test proves nothing. What every layer's attention gives and gets is compared too,
which names the rank that mixes documents. Dropout stays on: masks do not depend on tokens.

    documents 0 1 2 | trunk 3 with branches 4, 5 | padding      change 1: only 1 may differ
                                                                change 3 in its shared prefix: 3, 4 and 5 may
                                                                differ

An attention backend that refuses shared prefixes gets six plain documents.

Last, from the same runs: positions count from the start of every document, and every weight of every rank
gets a gradient, or some stage left a layer out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_iml.config import POSITION_OFFSET
from megatron_iml.data.rows.assemble import Piece, Row, assemble_row
from megatron_iml.model.parameters import named_global_parameters

from .copies import check_copies
from .engine import Engine
from .trace import Trace, run_traced

TRUNK = 3
BRANCHES = (4, 5)


@dataclass(frozen=True)
class Findings:
    """What one rank found."""

    problems: list[str]
    first_leak: int | None = None
    """The lowest layer whose attention let a document see another. Layers above only pass it on."""
    last_gradient_leak: int | None = None
    """The highest layer whose attention let a gradient across; the backward runs downwards."""


def run_self_test(engine: Engine) -> None:
    """Raise RuntimeError, naming the ranks, if this layout does not compute what it should."""
    check_copies(engine)
    model = engine.config.model
    # As long as this run's rows and positions allow: tiles and shards are those of training.
    pieces = sample_documents(
        engine.config.data.row_length,
        model.vocab_size,
        model.max_position_embeddings,
        shares_prefixes=model.attention_backend != "flash",
    )
    before = run_traced(engine, _row(engine, pieces))
    # Now: the next run of a row clears the gradients that this one has left in the buffers.
    problems = [*_wrong_positions(before, pieces), *_weights_without_gradient(engine)]
    leaks: list[int] = []
    gradient_leaks: list[int] = []
    # A plain document; a trunk inside its shared prefix; a branch beyond it.
    for changed in (1, TRUNK, BRANCHES[0]):
        may_differ = {changed} | {index for index, piece in enumerate(pieces) if piece.trunk == changed}
        after = run_traced(engine, _row(engine, _change(pieces, changed, model.vocab_size)))
        problems += _compare(engine, pieces, before, after, changed, may_differ)
        owners_T = _slot_owners(pieces, engine.config.data.row_length)
        leaks += _leaky_layers(before.attention_T, after.attention_T, owners_T, may_differ)
        gradient_leaks += _leaky_layers(
            before.attention_gradients_T,
            after.attention_gradients_T,
            owners_T,
            _with_trunks(pieces, may_differ),
        )
    # What the test left in the buffers would be added to the first step.
    engine.zero_gradients()
    # Gathered, because a fault shows on some stages only and all must stop.
    everyone: list[Findings] = [Findings([])] * engine.layout.world_size
    findings = Findings(problems, min(leaks, default=None), max(gradient_leaks, default=None))
    dist.all_gather_object(everyone, findings)
    lines = _verdict(everyone)
    if lines:
        raise RuntimeError(
            "self-test: this layout does not compute what it should\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\ndo not train with this attention backend and layout: documents would mix, or a layer would "
            "do nothing"
        )


def _verdict(everyone: list[Findings]) -> list[str]:
    """One line per problem, each with its rank; of leaks, the ranks where they begin."""
    lines = []
    first = min((f.first_leak for f in everyone if f.first_leak is not None), default=None)
    if first is not None:
        ranks = [rank for rank, findings in enumerate(everyone) if findings.first_leak == first]
        lines.append(f"ranks {ranks}: the attention of layer {first} lets documents see one another")
    last = max((f.last_gradient_leak for f in everyone if f.last_gradient_leak is not None), default=None)
    # Where hidden states differ, all gradients do: then they tell nothing.
    if last is not None and first is None:
        ranks = [rank for rank, findings in enumerate(everyone) if findings.last_gradient_leak == last]
        lines.append(f"ranks {ranks}: the backward of layer {last}'s attention mixes documents")
    return lines + [f"rank {rank}: {text}" for rank, f in enumerate(everyone) for text in f.problems]


def sample_documents(
    row_length: int, vocab_size: int, max_positions: int, shares_prefixes: bool = True
) -> list[Piece]:
    """Six documents of odd lengths that leave some padding; sources of one or two tokens, and of the branches
    the whole shared prefix and one token more, so that nearly every slot has a loss."""
    # The same documents on every rank, without a broadcast; ids from 4 on are no special tokens.
    rng = np.random.default_rng(0)
    # The longest takes 3 units; rows may be longer than any document can be.
    unit = max(min(row_length // 16, max_positions // 3), 3)
    lengths = [unit, 2 * unit + 1, 3, 3 * unit, 2 * unit, 2 * unit - 1]
    documents = [rng.integers(4, vocab_size, length).astype(np.int32) for length in lengths]
    shared = unit
    pieces = [Piece(tokens, source_length=1 + index % 2) for index, tokens in enumerate(documents)]
    for branch in BRANCHES if shares_prefixes else ():
        tokens = np.concatenate([documents[TRUNK][:shared], documents[branch][shared:]])
        pieces[branch] = Piece(tokens, source_length=shared + 1, trunk=TRUNK, shared=shared)
    return pieces


def _change(pieces: list[Piece], changed: int, vocab_size: int) -> list[Piece]:
    """Change one token of a document: of a trunk, one inside the shared prefix, which the branches then carry
    too."""
    place = pieces[changed].shared
    # The next id, round the vocabulary: another one, and no special token, whatever its size.
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


def _leaky_layers(
    before_T: dict[int, Tensor], after_T: dict[int, Tensor], owners_T: NDArray[np.int64], may_differ: set[int]
) -> list[int]:
    """Layers in which a slot changed that belongs to no document that may."""
    return [
        layer
        for layer, digests_T in before_T.items()
        if set(owners_T[(digests_T != after_T[layer]).cpu().numpy()].tolist()) - may_differ
    ]


def _wrong_positions(trace: Trace, pieces: list[Piece]) -> Iterator[str]:
    """Positions count from the start of a document, a branch's from the end of the prefix it shares."""
    if trace.rows_T is None:
        return
    read_T = trace.rows_T.cpu().numpy() - POSITION_OFFSET
    first = 0
    for index, piece in enumerate(pieces):
        expected = np.arange(piece.shared, len(piece.tokens) - 1)
        found = read_T[first : first + len(expected)]
        if not np.array_equal(found, expected):
            yield (
                f"document {index} is at positions {found[0]} to {found[-1]}, its slots count from "
                f"{expected[0]} to {expected[-1]}"
            )
        first += len(expected)


def _weights_without_gradient(engine: Engine) -> list[str]:
    """Weights that a backward left untouched: their layer never ran, or its result was thrown away."""
    named = list(named_global_parameters(engine.chunks))
    # Beyond this data rank's slice the buffer still holds the rank's own sums, which prove as much.
    reached = torch.stack([(vars(parameter)["main_grad"] != 0).any() for _, parameter in named]).tolist()
    rest = [name for (name, _), is_reached in zip(named, reached, strict=True) if not is_reached]
    return [f"no gradient reached {rest[0]} and {len(rest) - 1} more weights"] if rest else []


def _compare(
    engine: Engine, pieces: list[Piece], before: Trace, after: Trace, changed: int, may_differ: set[int]
) -> list[str]:
    """Describe every violation that this rank can see."""
    problems = []
    slot_owner_T = _slot_owners(pieces, engine.config.data.row_length)
    if before.losses_M is not None and after.losses_M is not None:
        # Targets come in the order of documents, as `assemble_row` puts them.
        owner_M = np.concatenate([np.full(len(p.tokens) - p.source_length, i) for i, p in enumerate(pieces)])
        # inf equals inf: what is not finite counts as changed.
        differs_M = (before.losses_M != after.losses_M).cpu().numpy() | ~np.isfinite(
            after.losses_M.cpu().numpy()
        )
        leaked = sorted(set(owner_M[differs_M].tolist()) - may_differ)
        if leaked:
            problems.append(f"losses of documents {leaked} changed with document {changed}")
        # A test whose change reaches nothing would pass on any layout.
        if changed not in owner_M[differs_M]:
            problems.append(f"losses of document {changed} did not change with its own tokens")
    if before.gradients_TF is not None and after.gradients_TF is not None:
        local = slice(0, None)
        # The embedding's output is cut along the row there; attention and losses are not.
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
