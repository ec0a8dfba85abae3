"""What every kernel test needs: an error budget that is argued, poisoned memory, packed rows to attend in.

    with nan_poison(): out = op(x)                      # elements that the op does not write are NaN
    assert_within_budget("out", out, torch_out, truth)  # at most twice the error of torch in the same type
    end_T = documents_end([3, 2], padding=1)            # [3, 3, 3, 5, 5, 5]
    end_T = tree_end(2, [2, 1])                         # [5, 5, 4, 4, 5], a trunk of 2, branches of 2 and 1

The budget: a kernel may err twice as much as plain torch errs when it computes the same in the same type,
both measured against fp64, since one rounding more or less doubles or halves an error; gradients, whose
inputs are themselves rounded results, three times. Nothing loosens it, on no machine.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0

Op = Callable[..., tuple[Tensor, ...]]


@contextlib.contextmanager
def nan_poison() -> Iterator[None]:
    """Fill fresh memory with NaN (integers: their largest value), so that what stays unwritten shows.

    torch does so under deterministic algorithms; `torch.empty` inside a kernel's launch is meant.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    # Only with deterministic algorithms does torch fill memory; warn_only, since some ops have none.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def max_error(result: Tensor, truth: Tensor) -> float:
    """Largest absolute difference in fp64; infinite where one is NaN and the other is not."""
    result, truth = result.detach().double(), truth.detach().to(result.device, torch.float64)
    if not torch.equal(result.isnan(), truth.isnan()):
        return float("inf")
    # Equal infinities have a difference of NaN, which is no error here.
    return float((result - truth).nan_to_num(nan=0.0).abs().max()) if result.numel() else 0.0


def assert_within_budget(
    name: str, result: Tensor, same_dtype: Tensor, truth: Tensor, factor: float = FORWARD_FACTOR
) -> None:
    """Assert that `result` errs at most `factor` times as much as torch does in the same type.

    Args:
        name: of the tensor, for the message.
        result: of the kernel.
        same_dtype: the same computed by plain torch in the kernel's type.
        truth: the same computed in fp64.
        factor: FORWARD_FACTOR or GRADIENT_FACTOR.

    One unit in the last place of the largest value is allowed on top: torch may be exact by luck.
    """
    assert result.dtype == same_dtype.dtype, f"{name} is {result.dtype}, torch's {same_dtype.dtype}"
    # Not an infinity: a rounding of it would allow any error elsewhere.
    finite = truth.detach().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(finite.abs().max()) if truth.numel() else 0.0
    error, budget = max_error(result, truth), factor * max_error(same_dtype, truth)
    # Where torch itself has a NaN or an overflow that the truth has not, everything would pass.
    assert math.isfinite(budget), f"{name}: torch in {result.dtype} is no measure, its budget is {budget}"
    budget += torch.finfo(result.dtype).eps * largest
    assert error <= budget, f"{name}: error {error:.3e} exceeds {budget:.3e} (largest value {largest:.3e})"


def run_op(op: Op, inputs: Mapping[str, Tensor], upstream: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs of `op(**inputs)` and the gradients of all inputs, by name.

    Args:
        op: takes `inputs` as keywords, returns a tuple of outputs.
        upstream: one gradient per output, in any type.
    """
    outputs = op(**inputs)
    # One list of gradients serves the kernel, torch and the fp64 truth.
    upstream = [gradient.to(output.dtype) for gradient, output in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return named | {f"gradient of {name}": value for name, value in zip(inputs, gradients, strict=True)}


def assert_op_within_budget(
    op: Op, torch_op: Op, reference: Op, inputs: Mapping[str, Tensor], upstream: Sequence[Tensor]
) -> None:
    """Run a kernel on poisoned memory and hold every output and gradient against the budget.

    Args:
        op, torch_op, reference: the kernel, what a model without it computes in the same type, and the
            truth, which is given fp64 inputs; each as in `run_op`.
    """
    with nan_poison():
        ours = run_op(op, inputs, upstream)
    same_dtype = run_op(torch_op, inputs, upstream)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    truth = run_op(reference, exact, upstream)
    for name, value in ours.items():
        factor = GRADIENT_FACTOR if name.startswith("gradient") else FORWARD_FACTOR
        assert_within_budget(name, value, same_dtype[name], truth[name], factor)


def documents_end(lengths: Sequence[int], padding: int = 0) -> Tensor:
    """`end_T`, int32 [sum of lengths + padding], of documents back to back and padding behind them."""
    end: list[int] = []
    for length in lengths:
        end.extend([len(end) + length] * length)
    end.extend(range(len(end), len(end) + padding))
    return torch.tensor(end, dtype=torch.int32)


def tree_end(trunk: int, branches: Sequence[int]) -> Tensor:
    """`end_T`, int32, of a trunk of `trunk` slots that all `branches` (slots each) continue."""
    end = [trunk + sum(branches)] * trunk
    for branch in branches:
        end.extend([len(end) + branch] * branch)
    return torch.tensor(end, dtype=torch.int32)


def random_forest_end(seed: int, tokens: int, longest: int) -> Tensor:
    """`end_T`, int32 [tokens], of a random row: documents, trees to depth 3 and padding between them.

    Args:
        seed: of the random choices.
        tokens: slots of the row.
        longest: slots of a document without its branches, at most; lengths are spread evenly over their
            logarithm, so length 1 is common.
    """
    rng = random.Random(seed)
    end: list[int] = []
    while len(end) < tokens:
        if rng.random() < 0.15:
            end.extend(range(len(end), len(end) + rng.randint(1, 3)))
        else:
            _append_tree(end, rng, longest, depth=0)
    # A tree that the row's end cuts: its columns are seen up to there.
    return torch.tensor(end[:tokens], dtype=torch.int32).clamp(max=tokens)


def _append_tree(end: list[int], rng: random.Random, longest: int, depth: int) -> None:
    first, length = len(end), round(longest ** rng.random())
    end.extend([first + length] * length)
    if depth < 3 and rng.random() < 0.4:
        # Longer prefixes first: every column is then seen by one interval of rows.
        for prefix in sorted((rng.randint(1, length) for _ in range(rng.randint(1, 4))), reverse=True):
            _append_tree(end, rng, longest, depth + 1)
            # The trunk's columns are seen by the branch, and by all that hang on it.
            end[first : first + prefix] = [len(end)] * prefix
