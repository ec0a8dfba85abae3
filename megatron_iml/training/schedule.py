"""Learning rate: linear warm-up, then linear decay, as OPT-IML.

peak 5e-5, 60 warm-up steps, 4000 steps:   step 0 -> 8.3e-7, step 59 -> 5e-5, step 3999 -> 1.3e-8
"""

from megatron_iml.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of a step.

    Args:
        step: steps taken before this one.
        steps: steps of the whole run; the decay reaches `min_learning_rate` just after the last.
        config: peak, minimum and warm-up.
    """
    peak, lowest, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    # + 1, so that the first step already moves.
    if step < warmup:
        return peak * (step + 1) / warmup
    # A warm-up as long as the run leaves nothing to decay.
    remaining = (steps - step) / max(steps - warmup, 1)
    return lowest + (peak - lowest) * max(min(remaining, 1.0), 0.0)
