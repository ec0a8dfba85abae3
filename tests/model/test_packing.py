"""Packed documents are the documents apart: every loss and every gradient, with and without shared prefixes.

Tolerance: both sides are fp32 and differ in the order of sums only. Seen: losses 1e-6, gradients 2e-6 of a
tensor's largest. A key's bias cannot change a softmax, so its gradient is rounding noise: errors are measured
against the largest gradient of the whole kind of tensor (query, key and value biases lie in one), with 1e-6
as floor. A position or a mask that is off shows at 1e-2 and more (last test).
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import plan_of, write_corpus
from helpers import single_rank, tiny_config
from torch import Tensor

from megatron_iml.config import Config
from megatron_iml.data.plan.mixture import Mixture
from megatron_iml.data.plan.packing import PackingConfig
from megatron_iml.data.rows.assemble import Piece, Row, assemble_row
from megatron_iml.data.rows.loader import Loader
from megatron_iml.model.build import build_model
from megatron_iml.model.initialise import initialise
from megatron_iml.model.parameters import named_global_parameters
from megatron_iml.model.row import to_device

VOCABULARY = 5440
ROW_LENGTH = 40


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny_config(vocab_size=VOCABULARY, init_method_std=0.1)


def run(config: Config, rows: list[Row]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of every row and the gradients of their sum."""
    with single_rank(config) as layout:
        chunks = build_model(config, layout)
        initialise(chunks, config.model, 5, layout)
        generator = torch.Generator().manual_seed(0)
        for parameter in chunks[0].parameters():
            if parameter.dim() == 1:
                # Zero biases and unit norms would hide a mistake in them.
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        losses = [chunks[0](to_device(row, layout.device)) for row in rows]
        torch.stack([loss.total for loss in losses]).sum().backward()
        gradients = {name: parameter.grad for name, parameter in named_global_parameters(chunks)}
    assert all(gradient is not None for gradient in gradients.values())
    return [loss.losses_M for loss in losses], {name: g for name, g in gradients.items() if g is not None}


def apart(pieces: list[Piece]) -> list[Row]:
    """Each document alone in a row that it fills."""
    return [
        assemble_row([Piece(piece.tokens, piece.source_length)], len(piece.tokens) - 1, index)
        for index, piece in enumerate(pieces)
    ]


def assert_same(config: Config, packed: Row, pieces: list[Piece]) -> None:
    ours, our_gradients = run(config, [packed])
    theirs, their_gradients = run(config, apart(pieces))
    torch.testing.assert_close(ours[0], torch.cat(theirs), rtol=0, atol=1e-5)
    assert_same_gradients(our_gradients, their_gradients)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, gradient in ours.items():
        truth = theirs[name]
        error = (gradient - truth).abs().max() / truth.abs().max().clamp_min(1e-6)
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def piece(tokens: list[int], source_length: int, trunk: int = -1, shared: int = 0) -> Piece:
    return Piece(np.array(tokens, dtype=np.int32), source_length, trunk, shared)


def random_piece(seed: int, length: int, source_length: int) -> Piece:
    tokens = np.random.default_rng(seed).integers(4, VOCABULARY, length)
    return Piece(tokens.astype(np.int32), source_length)


def test_metaseqs_worked_example(config: Config) -> None:
    # metaseq packs `143 345 2 5435 2`: two documents that end with </s>, whose positions are 2 3 4 and 2 3.
    pieces = [piece([143, 345, 2], 0), piece([5435, 2], 0)]
    packed = assemble_row(pieces, 4, index=0)
    assert packed.tokens_T.tolist() == [143, 345, 5435, 1]
    assert packed.target_ids_M.tolist() == [345, 2, 2]
    assert_same(config, packed, pieces)
    _, gradients = run(config, [packed])
    rows = gradients["embedding.position_embeddings.weight"].abs().sum(1)
    # The first </s> is predicted, not read, so no document reaches a third position.
    assert rows.nonzero().flatten().tolist() == [2, 3]


def test_documents_of_all_lengths_with_padding(config: Config) -> None:
    pieces = [
        random_piece(1, 2, 1),
        random_piece(2, 14, 9),
        random_piece(3, 2, 0),
        random_piece(4, 9, 0),
        random_piece(5, 7, 6),
    ]
    assert_same(config, assemble_row(pieces, ROW_LENGTH, index=0), pieces)


def test_one_document_that_fills_the_row(config: Config) -> None:
    pieces = [random_piece(6, ROW_LENGTH + 1, 3)]
    assert_same(config, assemble_row(pieces, ROW_LENGTH, index=0), pieces)


def nested_pieces() -> list[Piece]:
    """A trunk, a branch, a branch on that branch, one on the trunk's first tokens, and a stranger."""
    trunk = [10, 11, 12, 13, 14, 15, 16, 2]
    return [
        piece(trunk, 4),
        piece([*trunk[:6], 30, 31, 32, 33, 2], 3, trunk=0, shared=6),
        piece([*trunk[:6], 30, 31, 40, 2], 9, trunk=1, shared=8),
        piece([*trunk[:3], 50, 2], 1, trunk=0, shared=3),
        piece([*trunk[:3], 51], 4 - 1, trunk=0, shared=3),
        piece([10, 11, 60, 2], 2),
    ]


def test_nested_prefixes_are_the_documents_apart(config: Config) -> None:
    pieces = nested_pieces()
    packed = assemble_row(pieces, ROW_LENGTH, index=0)
    # 42 tokens; 6 are never read and 20 are shared.
    assert packed.layout.num_real == 16
    assert_same(config, packed, pieces)


def test_prefixes_that_the_plan_builder_shares_are_the_documents_apart(
    config: Config, tmp_path: Path
) -> None:
    rng = np.random.default_rng(4)
    definitions = rng.integers(4, VOCABULARY, (2, 34)).tolist()
    documents = []
    for number in range(14):
        # Two definitions; under the first, some documents share a demonstration as well.
        shown = [300, 301, 302, 303, 304] if number % 4 == 0 else []
        question = rng.integers(4, VOCABULARY, rng.integers(1, 6)).tolist()
        answer = [*rng.integers(4, VOCABULARY, rng.integers(1, 5)).tolist(), 2]
        documents.append([definitions[number % 2] + shown + question, answer])
    # One that comes twice stores nothing the second time.
    documents.append(documents[0])
    corpus = write_corpus(tmp_path / "corpus", {"A__b__c": documents})
    packing = PackingConfig(Mixture(), row_length=120, rows=None, seed=1, max_positions=64, branches=5)
    plan = plan_of(corpus, packing, tmp_path / "plan")
    assert plan.entries_E["trunk"].tolist().count(-1) == 4  # of 15 documents in trees of up to 6
    assert (plan.entries_E["shared"] > 34).sum() >= 3
    loader = Loader(corpus, plan)
    rows = [loader.row(row) for row in range(plan.num_rows)]
    pieces = [Piece(*corpus.tokens(int(entry["document"]), 0)) for entry in plan.entries_E]
    ours, our_gradients = run(config, rows)
    theirs, their_gradients = run(config, apart(pieces))
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=0, atol=1e-5)
    assert_same_gradients(our_gradients, their_gradients)


def test_the_comparison_sees_a_wrong_position_and_a_wrong_bound(config: Config) -> None:
    pieces = nested_pieces()
    packed = assemble_row(pieces, ROW_LENGTH, index=0)
    truth = torch.cat(run(config, apart(pieces))[0])
    for name, wrong in (
        ("positions_T", np.arange(ROW_LENGTH, dtype=np.int32)),
        ("end_T", np.full(ROW_LENGTH, packed.layout.num_real, dtype=np.int32)),
        ("end_T", np.minimum(packed.layout.end_T + 1, ROW_LENGTH)),
    ):
        broken = dataclasses.replace(packed, layout=dataclasses.replace(packed.layout, **{name: wrong}))
        losses, _ = run(config, [broken])
        assert (losses[0] - truth).abs().max() > 1e-2, name
