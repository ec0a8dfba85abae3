"""The bash launchers: what they start, with a stand-in for Python and, for SLURM, for srun and scontrol."""

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LAUNCHERS = sorted(EXAMPLES.rglob("*.sh"))


def stand_in(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def launch(
    name: str, *arguments: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | environment)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.name)
def test_a_launcher_is_executable_strict_and_parses(launcher: Path) -> None:
    assert os.access(launcher, os.X_OK)
    assert "\nset -euo pipefail\n" in launcher.read_text()
    subprocess.run(["bash", "-n", str(launcher)], check=True)


@pytest.mark.parametrize("name", ["train_cpu.sh", "train_node.sh", "train_slurm.sh"])
def test_without_a_config_a_launcher_says_how_it_is_used(name: str) -> None:
    done = launch(name)
    assert done.returncode == 2
    assert "CONFIG.yaml [section.field=value ...]" in done.stderr and done.stderr.startswith("usage: ")


def test_the_cpu_launcher_starts_so_many_processes(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "python", 'echo "$CUDA_VISIBLE_DEVICES|$OMP_NUM_THREADS|$*"')
    done = launch("train_cpu.sh", "a b.yaml", "training.steps=3", PYTHON=str(python), NUM_PROCESSES="2")
    assert done.stdout == (
        "|1|-m megatron_iml.launch --standalone --nproc-per-node 2 "
        "-m megatron_iml.train --config a b.yaml training.steps=3\n"
    )


@pytest.mark.parametrize("name", ["train_cpu.sh", "train_node.sh", "train_slurm.sh"])
def test_a_launcher_starts_nothing_with_a_wrong_configuration(tmp_path: Path, name: str) -> None:
    refusal = '[[ "$*" == *--explain* ]] && { echo wrong >&2; exit 2; }'
    python = stand_in(tmp_path, "python", f"[[ $1 == -c ]] && {{ echo 8; exit; }}; {refusal}; echo started")
    stand_in(tmp_path, "srun", "echo started")
    stand_in(tmp_path, "scontrol", '[[ $1 == show ]] && echo gpu-1 || echo "$@"')
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu-1", "SLURM_NTASKS": "8"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch(name, "train.yaml", PATH=path, PYTHON=str(python), **slurm)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "wrong\n")


def test_the_demo_removes_nothing_but_a_demo(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = launch("demo/run.sh", str(tmp_path), PYTHON="false")
    assert done.returncode == 2
    assert f"{tmp_path} holds something that this demo did not make" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_node_launcher_takes_every_gpu(tmp_path: Path) -> None:
    python = stand_in(
        tmp_path, "python", '[[ $1 == -c ]] && echo 4 || echo "$CUDA_DEVICE_MAX_CONNECTIONS|$*" | tee -a log'
    )
    done = launch("train_node.sh", "train.yaml", "training.steps=3", folder=tmp_path, PYTHON=str(python))
    train = "-m megatron_iml.train --config train.yaml"
    started = f"1|-m megatron_iml.launch --standalone --nproc-per-node 4 {train} training.steps=3\n"
    assert done.stdout == started
    checked = f"1|{train} --explain --world-size 4 training.steps=3\n"
    assert (tmp_path / "log").read_text() == checked + started


def test_the_node_launcher_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "python", "[[ $1 == -c ]] && echo 0 || echo started")
    done = launch("train_node.sh", "train.yaml", PYTHON=str(python))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: GPUs: got none") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_the_slurm_launcher_requeues_what_saved_and_left(tmp_path: Path, status: int, requeued: bool) -> None:
    variables = "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT"
    python = stand_in(
        tmp_path, "python", f'[[ "$*" == *--explain* ]] && exit; echo "{variables} $*"; exit {status}'
    )
    # srun starts the task of rank 9, the second on the second of two nodes, and drops its own two options.
    stand_in(tmp_path, "srun", 'shift 2; SLURM_PROCID=9 SLURM_LOCALID=1 exec "$@"')
    stand_in(tmp_path, "scontrol", '[[ $1 == show ]] && printf "gpu-%s\\n" 1 2 || echo "$@"')
    done = launch(
        "train_slurm.sh",
        "train.yaml",
        "training.steps=3",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHON=str(python),
        SLURM_JOB_ID="41007",
        SLURM_JOB_NODELIST="gpu-[1-2]",
        SLURM_NTASKS="16",
        SLURM_NTASKS_PER_NODE="8",
    )
    assert done.returncode == status
    started, *after = done.stdout.splitlines()
    assert started == "9/16 1/8 gpu-1:21007 -m megatron_iml.train --config train.yaml training.steps=3"
    assert after == (["requeue 41007"] if requeued else [])


def test_the_slurm_launcher_is_a_job_script() -> None:
    done = launch("train_slurm.sh", "train.yaml", SLURM_JOB_NODELIST="")
    assert done.returncode != 0
    assert "error: this is a job script: sbatch" in done.stderr and done.stdout == ""
