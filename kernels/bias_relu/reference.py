"""relu(x + bias) in plain torch: the truth for the kernels. T slots, F features.

x [[1, -3]], bias [1, 1]  ->  [[2, 0]]
"""

import torch
from torch import Tensor


def bias_relu_reference(x_TF: Tensor, bias_F: Tensor) -> Tensor:
    """relu(x + bias), added in fp32 (fp64 for fp64 input) and rounded once; see `op.bias_relu`."""
    precision = torch.promote_types(x_TF.dtype, torch.float32)
    return torch.relu(x_TF.to(precision) + bias_F.to(precision)).to(x_TF.dtype)
