"""Adam with decoupled weight decay, in the form megatron-core's distributed optimizer can save and reshard.

    m = beta1 m + (1 - beta1) g               m_hat = m / (1 - beta1^t)
    v = beta2 v + (1 - beta2) g^2             v_hat = v / (1 - beta2^t)
    p = p - lr (weight_decay p + m_hat / (sqrt(v_hat) + eps))

The arithmetic is torch's fused kernel. What differs from `torch.optim.AdamW` is where the step count lives:
in the parameter group, one for all, because megatron-core's reshardable checkpoints keep per-parameter
tensors only (with torch's own AdamW a load dies with `KeyError: 'step'`).
"""

from typing import Any

import torch
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """Adam over the parameter groups that megatron-core has made."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        """Take over the groups.

        Args:
            groups: megatron-core's parameter groups; each has `params` (fp32 shards), `lr` and
                `weight_decay`.
            betas: decay of the two moments.
            eps: added to the root of the second moment.
        """
        # torch refuses an optimizer without parameters; this one is replaced below.
        super().__init__([torch.nn.Parameter(torch.empty(0))], {"betas": betas, "eps": eps})
        # The shards are views of the gradient buffer, not leaves, which add_param_group would refuse.
        self.param_groups = groups
        for group in self.param_groups:
            group.update(betas=betas, eps=eps, step=0)
        self.gradient_factor = 1.0
        """What the next update, and that alone, multiplies gradients by; they stay so."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Adam re-evaluates nothing: pass no closure"
        for group in self.param_groups:
            # Read before it is counted: torch's kernel counts the update itself.
            updates_before, group["step"] = group["step"], group["step"] + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            self._create_state(params)
            # torch's kernel divides.
            divisor = (
                None if self.gradient_factor == 1.0 else params[0].new_full((), 1.0 / self.gradient_factor)
            )
            adamw(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                max_exp_avg_sqs=[],
                # torch's kernel wants one counter per tensor, on the tensors' device.
                state_steps=list(params[0].new_full((len(params),), updates_before).unbind()),
                fused=True,
                grad_scale=divisor,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        self.gradient_factor = 1.0

    def _create_state(self, params: list[torch.Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)

    def state_dict(self) -> dict[str, Any]:
        """torch's format, with the count repeated for every parameter as megatron-core expects to read it."""
        # A fresh process loads into this state before its first step.
        for group in self.param_groups:
            self._create_state(group["params"])
        packed = super().state_dict()
        steps = {index: group["step"] for group in packed["param_groups"] for index in group["params"]}
        packed["state"] = {
            index: {**state, "step": torch.tensor(float(steps[index]))}
            for index, state in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moments and step counts. Everything else stays as the configuration says, also where it differs
        from the run that saved: a resumed run does what its config.yaml shows."""
        state = {
            index: {name: value for name, value in entry.items() if name != "step"}
            for index, entry in state_dict["state"].items()
        }
        groups = [
            {**ours, "params": saved["params"], "step": int(saved["step"])}
            for ours, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        super().load_state_dict({"state": state, "param_groups": groups})
