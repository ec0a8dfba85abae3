"""Change one document: every loss and embedding gradient of the others keeps its bits, dropout on."""

import numpy as np
import pytest
import torch
from helpers import single_rank, tiny_config
from torch import Tensor

from megatron_iml.data.rows.assemble import Piece, assemble_row
from megatron_iml.model.build import build_model
from megatron_iml.model.initialise import initialise
from megatron_iml.model.opt import OPTModel
from megatron_iml.model.row import to_device

LENGTHS = [2, 9, 17, 3, 2, 12]
ROW_LENGTH = 48


def losses_and_gradients(model: OPTModel, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
    """Per-target losses, and the gradient of their sum at every slot's embedding [T, features]."""
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    hook = model.embedding.register_forward_hook(keep)
    losses = model(to_device(assemble_row(pieces, ROW_LENGTH, index=3), torch.device("cpu")))
    losses.total.backward()
    hook.remove()
    assert embedded[0].grad is not None
    return losses.losses_M, embedded[0].grad[:, 0]


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_the_others_keep_their_bits(changed: int) -> None:
    rng = np.random.default_rng(changed)
    pieces = [Piece(rng.integers(4, 96, length).astype(np.int32), 1) for length in LENGTHS]
    other = list(pieces)
    other[changed] = Piece(rng.integers(4, 96, LENGTHS[changed]).astype(np.int32), 1)
    config = tiny_config(
        hidden_dropout=0.2, attention_dropout=0.2, embedding_dropout=0.2, init_method_std=0.1
    )
    with single_rank(config) as layout:
        chunks = build_model(config, layout)
        initialise(chunks, config.model, 1, layout)
        losses, gradients = losses_and_gradients(chunks[0].train(), pieces)
        new_losses, new_gradients = losses_and_gradients(chunks[0], other)
    # With one source token each, a document's slots and its targets are the same number.
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1)
    mine = owner == changed
    assert torch.equal(losses[~mine], new_losses[~mine])
    assert torch.equal(gradients[: len(owner)][~mine], new_gradients[: len(owner)][~mine])
    assert (losses[mine] != new_losses[mine]).any()
    assert (new_gradients[len(owner) :] == 0).all(), "padding got a gradient"
