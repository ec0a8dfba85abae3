"""The layout in words."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_iml.config import load_config
from megatron_iml.config.explain import bubble, explain

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "opt-175b.yaml"


def test_bubble_of_a_pipeline() -> None:
    """3 of 4 stages' micro-batches are idle time, halved by interleaving: 3 / (32 + 3), 1.5 / (32 + 1.5)."""
    flat = load_config(RECIPE, ["parallel.virtual_pipeline_model_parallel_size=null"])
    assert bubble(flat, 128) == pytest.approx(3 / 35)
    assert bubble(load_config(RECIPE), 128) == pytest.approx(1.5 / 33.5)
    assert bubble(load_config(RECIPE, ["parallel.pipeline_model_parallel_size=1"]), 128) == 0


def test_every_rank_is_named_with_what_it_holds() -> None:
    lines = explain(load_config(RECIPE), 128).splitlines()
    assert "174,604,468,224 parameters" in lines[0]
    assert lines[1] == "world: 128 ranks = tensor 8 x data 4 x pipeline 4"
    stages = [line.split() for line in lines if line.lstrip()[:1].isdigit()]
    assert [stage[:2] for stage in stages] == [["0", "0-31"], ["1-2", "32-95"], ["3", "96-127"]]
    assert stages[0][2:6] == ["0-11,", "48-59", "embedding", "5,540,253,696"]
    assert stages[2][2:5] == ["36-47,", "84-95", "head"]
    text = "\n".join(lines)
    assert "128 rows of 2,048 positions, one row a micro-batch, 32 micro-batches a rank" in text
    assert "pipeline bubble: 4.5% of the step (3 of 32 micro-batches' time, divided by 2" in text
    # 2,048 x 12,288 x 2 bytes over 8 tensor ranks.
    assert "hidden states of 6 MiB to the next stage and as much gradient back, over 7 borders" in text
    # 4 x 50,272 x 12,288 bytes over 8 tensor ranks.
    assert "0.29 GiB of embedding gradient between the first and the last stage" in text
    assert "gradients, up to 20.64 GiB reduce-scattered over data ranks while the backward runs" in text


def test_one_rank_sends_nothing() -> None:
    text = explain(load_config(None, ["model.size=opt-125m"]), 1)
    assert text.endswith("sent, by one rank:\n  nothing: one rank")


def test_the_command_answers_without_torch() -> None:
    program = (
        "import sys; from megatron_iml.train import main; "
        f"assert main(['--config', {str(RECIPE)!r}, '--explain', '--world-size', '128']) == 0; "
        "assert not {'torch', 'megatron', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == explain(load_config(RECIPE), 128) + "\n"
