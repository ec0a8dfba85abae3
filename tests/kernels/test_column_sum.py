"""column_sum over more partial rows than one block has, exact and rounded once."""

import pytest
import torch
from kernel_cases import DEVICE

pytest.importorskip("triton", reason="triton is not installed")


# Blocks are of 64 rows and 32 columns: one element, one block, several with a rest. Outside of a GPU no op
# writes more partial rows than a block has.
@pytest.mark.parametrize("shape", [(1, 1), (64, 32), (150, 3, 23)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from megatron_iml.kernels.column_sum import column_sum

    generator = torch.Generator().manual_seed(3)
    # Whole numbers: their sums are exact in fp32 in any order, and are not all numbers of fp16.
    partials = torch.randint(-4000, 4000, shape, generator=generator).float().to(DEVICE)
    found = column_sum(partials, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, partials.double().sum(0).to(dtype))
