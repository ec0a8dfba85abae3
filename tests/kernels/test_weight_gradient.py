"""accumulate_weight_gradient adds to what is there, in fp32, whatever the type of its factors."""

import pytest
import torch
from kernel_cases import DEVICE, normal

from megatron_iml.kernels.testing import assert_within_budget
from megatron_iml.kernels.weight_gradient import (
    accumulate_weight_gradient,
    accumulate_weight_gradient_reference,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 17, 9), (200, 64, 128)])
def test_adds_in_fp32(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tokens, outputs, inputs = shape
    grad_output_TO = normal(tokens, outputs, seed=1, dtype=dtype).detach()
    input_TF = normal(tokens, inputs, seed=2, dtype=dtype).detach()
    # Not zeros: what is there has to stay.
    before_OF = normal(outputs, inputs, seed=3, dtype=torch.float32).detach()
    ours_OF, truth_OF = before_OF.clone(), before_OF.double()
    accumulate_weight_gradient(ours_OF, grad_output_TO, input_TF)
    accumulate_weight_gradient_reference(truth_OF, grad_output_TO, input_TF)
    # The factors are exact in fp32, so fp32 torch is the budget even for low-precision factors.
    torch_OF = before_OF + grad_output_TO.float().t() @ input_TF.float()
    assert_within_budget("main_grad", ours_OF, torch_OF, truth_OF)


def test_another_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"main_grad is torch.bfloat16, must be torch.float32"):
        accumulate_weight_gradient(
            torch.zeros(2, 3, dtype=torch.bfloat16, device=DEVICE),
            torch.zeros(4, 2, dtype=torch.bfloat16, device=DEVICE),
            torch.zeros(4, 3, dtype=torch.bfloat16, device=DEVICE),
        )
