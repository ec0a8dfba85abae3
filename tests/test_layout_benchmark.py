"""The benchmark of one node's layouts: its cases fit, what is left out and losses that differ are said."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_iml.config import Config, check_layout, load_config, micro_batches_per_step
from megatron_iml.config.memory import stage_memory

FILE = Path(__file__).parents[1] / "benchmarks" / "layouts.py"


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layouts_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()


def config_of(case: object) -> Config:
    """As `train_step.py` makes it from its arguments."""
    return load_config(
        None,
        [
            f"model.size={case.size}",
            f"data.row_length={case.row_length}",
            f"training.global_batch_positions={case.rows * case.row_length}",
            *case.overrides,
        ],
    )


@pytest.mark.parametrize("case", BENCHMARK.CASES, ids=lambda case: case.name)
def test_every_case_fits(case: object) -> None:
    config = config_of(case)
    check_layout(config, case.gpus)
    parallel = config.parallel
    assert micro_batches_per_step(config, case.gpus) % parallel.pipeline_model_parallel_size == 0
    stages = range(parallel.pipeline_model_parallel_size)
    gib = max(sum(stage_memory(config, case.gpus, stage)) for stage in stages) / 2**30
    # CUDA, NCCL and the allocator's gaps want the rest.
    assert gib < case.gib - 10, f"{case.name}: {gib:.0f} GiB"


def row(name: str, size: str, losses: list[float]) -> dict:
    return {
        "name": name,
        "size": size,
        "layers": 24,
        "losses": losses,
        "milliseconds": [100.0, 99.0, 101.0],
        "ranks": 4,
        "real_tokens_per_second": 1000,
        "useful_tflops_per_gpu": 1.5,
        "peak_memory_gib": 2.5,
        "device": "GPU",
        "versions": {},
        "commit": "abc",
    }


def test_cases_of_one_model_are_compared_with_its_first() -> None:
    rows = [
        row("a", "opt-1.3b", [10.0, 9.0]),
        row("b", "opt-1.3b", [10.0, 9.004]),
        row("c", "opt-6.7b", [8.0, 7.0]),
        row("d", "opt-6.7b", [8.01, 7.0]),
    ]
    assert BENCHMARK.disagreements(rows) == ["d: losses up to 1.0e-02 from c"]
    written = BENCHMARK.table(rows, [("e", "did not end within 5 s:\nTraceback")], steps=5)
    assert "| b | 4 | 100.0 (99.0-101.0) | 1,000 | 1.5 | 2.5 GiB | 9.0040 | 4.0e-03 |" in written
    assert written.endswith("\nLeft out: e: did not end within 5 s:\n") and "medians of 3 steps" in written


def test_a_case_that_cannot_run_says_why() -> None:
    case = next(case for case in BENCHMARK.CASES if case.gpus == 2 and case.gib == 140)
    assert BENCHMARK.reason_against(case, 2, 139.8) is None
    assert BENCHMARK.reason_against(case, 1, 139.8) == "needs 2 GPUs, 1 are used"
    assert BENCHMARK.reason_against(case, 4, 79.6) == "needs GPUs of 140 GiB, these have 80"


def test_a_name_that_no_case_has_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BENCHMARK, "memory_of_gpus", lambda: [80.0])
    monkeypatch.setattr(sys, "argv", ["layouts.py", "--output", str(tmp_path / "out"), "--only", "OPT-7B"])
    assert BENCHMARK.main() == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --only: got 'OPT-7B'; allowed: a part of one of 'OPT-1.3B, one GPU', ")
    assert not (tmp_path / "out").exists()
