"""A tensor that no kernel can read is refused by name, with what to call instead."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_iml.kernels.bias_relu import bias_relu
from megatron_iml.kernels.document_attention import DocumentBounds, document_attention
from megatron_iml.kernels.layer_norm import layer_norm
from megatron_iml.kernels.target_loss import target_loss
from megatron_iml.kernels.testing import documents_end

triton = pytest.importorskip("triton", reason="triton is not installed")


def attend() -> Tensor:
    return document_attention(torch.zeros(4, 1, 3, 8), DocumentBounds.from_end(documents_end([4])), 1.0)


def lose() -> tuple[Tensor, Tensor]:
    index_M = torch.zeros(1, dtype=torch.int64)
    return target_loss(torch.zeros(4, 8), torch.zeros(5, 8), index_M, index_M)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("bias_relu", lambda: bias_relu(torch.zeros(4, 8), torch.zeros(8))),
        ("layer_norm", lambda: layer_norm(torch.zeros(4, 8), torch.zeros(8), torch.zeros(8), 1e-5)),
        ("target_loss", lose),
        ("document_attention", attend),
    ],
)
def test_a_tensor_in_memory_is_refused_without_the_interpreter(
    name: str, op: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=rf"{name}: got a tensor on cpu; .* needs cuda.* {name}_reference"):
        op()
