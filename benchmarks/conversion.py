"""Time and memory of converting an OPT of a given size, from Hugging Face to native, to metaseq, and back.

    python benchmarks/conversion.py --size opt-6.7b --folder /scratch/convert --output benchmarks/results
    python benchmarks/conversion.py --size opt-175b --num-layers 1 --parts 16 --folder /scratch/convert

Random fp16 weights are written with the safetensors library, then converted by tools/checkpoint/convert.py in
processes of their own. Before a number is printed every tensor that came back must be the one that was
written, bit for bit. Reported: seconds of each conversion, with the imports; processor seconds, which other
jobs on the machine change little; bytes of weights per second of either; and the largest private memory
(RssAnon of /proc/PID/status, sampled every 20 ms): mapped pages of weight files are the page cache's. With
--cold the input is not in the page cache. The folder needs four times the size of the weights.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_iml.checkpoint.conversion.parameter_map import groups
from megatron_iml.config import ModelConfig, opt_size

ROOT = Path(__file__).parents[1]


def write_source(folder: Path, model: ModelConfig) -> int:
    """A sharded folder of random weights, two groups of parameters a file; returns bytes of weights."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "opt",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_dim": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "vocab_size": model.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config))
    # One pool of random numbers, read from another place for every tensor: drawing 6.7 billion takes minutes.
    pool = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).half()
    weight_map, total, place = {}, 0, 0
    for number, (_, group) in enumerate(groups(model)):
        tensors = {}
        for parameter in group:
            share = len(parameter.hugging_face)
            shape = (parameter.shape[0] // share, *parameter.shape[1:])
            for name in parameter.hugging_face:
                # By an odd number, so that all 2^20 places come before one comes again.
                place = (place + 7919) % (1 << 20)
                numel = torch.Size(shape).numel()
                repeated = pool[place:].repeat(numel // (len(pool) - place) + 1)
                # A copy: a view would keep the longer repetition in memory until the file is written.
                tensors[f"model.{name}"] = repeated[:numel].view(shape).clone()
        # Any name will do: the index says what is where.
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def private_bytes(pid: int) -> int:
    """RssAnon of a process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    # Gone before it was opened, or while it was read.
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def convert(*arguments: str | Path) -> dict[str, float]:
    """Run the command; returns seconds and the largest private memory."""
    command = [sys.executable, str(ROOT / "tools" / "checkpoint" / "convert.py"), *map(str, arguments)]
    # Of children that have ended and were waited for: the difference is this one's.
    began, before, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while process.poll() is None:
        peak = max(peak, private_bytes(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0, f"{command} ended with {process.returncode}"
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "peak_private_mib": round(peak / 2**20),
    }


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            # Pages that are not on the disk yet cannot be dropped.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def check_equal(left: Path, right: Path) -> int:
    """Every tensor bit-equal; returns how many."""
    places, others = files_of_tensors(left), files_of_tensors(right)
    assert places.keys() == others.keys(), "other tensors came back"
    # One tensor of each at a time: two copies of a model would not fit.
    for name, file in places.items():
        with safe_open(file, "pt") as one, safe_open(others[name], "pt") as other:
            same = torch.equal(one.get_tensor(name), other.get_tensor(name))
            assert same, f"{name} came back with other bits"
    return len(places)


def main() -> None:
    """Write, convert both ways, compare, report, clean up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="opt-6.7b", help="a published size (default: %(default)s)")
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--num-layers", type=int, help="fewer layers of that size's width")
    parser.add_argument("--parts", type=int, default=2, help="metaseq's parts (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop inputs from the page cache first")
    parser.add_argument("--verify", action="store_true", help="compare logits too")
    parser.add_argument("--output", type=Path, help="folder of conversion.jsonl, to append a row to")
    arguments = parser.parse_args()
    size = opt_size(arguments.size)
    # One layer of a size that no disk holds tells its memory: that depends on the largest tensor.
    size = size._replace(num_layers=arguments.num_layers or size.num_layers)
    model = ModelConfig(**size._asdict(), ffn_hidden_size=4 * size.hidden_size)
    source, native, parts, back, straight = (
        arguments.folder / name for name in ("source", "native", "parts", "back", "straight")
    )
    total = write_source(source, model)
    row = {
        "size": arguments.size,
        "num_layers": size.num_layers,
        "parts": arguments.parts,
        "weight_bytes": total,
        "cold": arguments.cold,
        "verify": arguments.verify,
    }
    # A shape with fewer layers is no published one, which would say its heads.
    heads = ["--num-attention-heads", str(size.num_attention_heads)]
    for name, form, places, options in (
        ("hugging_face_to_native", "native", (source, native), ["--inference-prefix", "eos"]),
        ("native_to_metaseq", "metaseq", (native, parts), ["--parts", str(arguments.parts)]),
        ("metaseq_to_hugging_face", "hugging-face", (parts, back), heads),
        ("native_to_hugging_face", "hugging-face", (native, straight), []),
    ):
        if arguments.cold:
            forget(places[0])
        extra = ["--verify"] if arguments.verify else []
        result = convert(form, "--input", places[0], "--output", places[1], *options, *extra)
        result["gigabytes_per_second"] = round(total / 1e9 / result["seconds"], 2)
        row[name] = result
        # Both ways back end in the form that was begun with.
        if form == "hugging-face":
            row["tensors_bit_equal"] = check_equal(source, places[1])
            # Makes room.
            shutil.rmtree(places[1])
            shutil.rmtree(parts, ignore_errors=True)
    row["machine"] = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    row["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    row["commit"] = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    print(json.dumps(row))
    if arguments.output is not None:
        with (arguments.output / "conversion.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
