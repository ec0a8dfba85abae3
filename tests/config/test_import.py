"""The configuration answers at once: it loads neither torch nor numpy."""

import subprocess
import sys

PROGRAM = """
import sys, time
start = time.process_time()
import megatron_iml.config
print(time.process_time() - start, *sorted({"torch", "numpy", "megatron.core"} & set(sys.modules)))
"""


def test_config_imports_quickly_and_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 0.3, f"import megatron_iml.config took {seconds} s of CPU time"
