"""What document_attention refuses: the first line says what, what was got, what is allowed and what to do."""

import pytest
import torch
from kernel_cases import DEVICE

from megatron_iml.kernels.document_attention import DocumentBounds, document_attention
from megatron_iml.kernels.testing import documents_end

pytest.importorskip("triton", reason="triton is not installed")

BOUNDS = DocumentBounds.from_end(documents_end([8]).to(DEVICE))


@pytest.mark.parametrize(
    ("shape", "change", "first_line"),
    [
        ((8, 2, 2, 16), {}, r"qkv has shape \(8, 2, 2, 16\).* allowed: \[tokens, heads, 3"),
        ((8, 2, 3, 256), {}, r"qkv has shape \(8, 2, 3, 256\).* head size 1 to 128"),
        ((9, 2, 3, 16), {}, r"end is torch.int32 \(8,\) .* must be torch.int32 \(9,\)"),
        ((8, 2, 3, 16), {"softmax_scale": 0.0}, r"softmax_scale is 0.0; it must be above 0"),
        ((8, 2, 3, 16), {"dropout_probability": 1.0}, r"dropout_probability is 1.0; allowed"),
        (
            (8, 2, 3, 6),
            {},
            r"head size 6, .* elements of 4 bytes; allowed: address, head size and all strides",
        ),
    ],
)
def test_what_is_refused(shape: tuple[int, ...], change: dict[str, float], first_line: str) -> None:
    with pytest.raises(ValueError, match=first_line):
        document_attention(torch.zeros(shape, device=DEVICE), BOUNDS, **({"softmax_scale": 1.0} | change))


def test_a_key_of_another_type_is_refused() -> None:
    # The kernel would take its 32 bits for all of a key.
    qkv, key = torch.zeros(8, 1, 3, 16, device=DEVICE), torch.zeros((), dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"dropout_key is \(\) torch.int32 .* must be \(\) torch.int64"):
        document_attention(qkv, BOUNDS, 1.0, 0.1, key)


def test_a_projection_that_begins_anywhere_is_refused() -> None:
    # Contiguous, but 4 bytes off.
    qkv = torch.zeros(1 + 8 * 3 * 16, device=DEVICE)[1:].view(8, 1, 3, 16)
    with pytest.raises(ValueError, match=rf"address {qkv.data_ptr()}, .* multiples of 16 bytes; pass"):
        document_attention(qkv, BOUNDS, 1.0)


def test_fp64_is_for_the_reference() -> None:
    with pytest.raises(ValueError, match=r"got torch.float64; allowed: .*document_attention_reference"):
        document_attention(torch.zeros(8, 1, 3, 16, dtype=torch.float64, device=DEVICE), BOUNDS, 1.0)
