"""tools/checkpoint/convert.py, called in this process: a process of its own would import torch every time."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tools" / "checkpoint" / "convert.py"
_spec = importlib.util.spec_from_file_location("convert", SCRIPT)
assert _spec is not None and _spec.loader is not None, f"{SCRIPT} cannot be imported"
_command = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_command)


def run(form: str, source: Path, output: Path, *options: str) -> int:
    """Exit status."""
    return _command.main([form, "--input", str(source), "--output", str(output), *options])
