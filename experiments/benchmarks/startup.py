"""How much sooner does a second start reach its first step, when compiled programs are kept?

    python experiments/benchmarks/startup.py                        # the quickstart: about two minutes on two cores
    python experiments/benchmarks/startup.py EXPERIMENT.py

Seconds from the start of a process to its compiled, or read, training step: without kept programs, and twice with them.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"


def seconds_to_the_first_step(experiment: str, folder: str, name: str, programs: str) -> float:
    command = [sys.executable, "-m", "jaxmem.cli", "train", experiment, "--out", f"{folder}/{name}", "--steps", "2"]
    environment = os.environ | {"JAXMEM_PROGRAMS": programs, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("the training step was"):
                seconds = time.monotonic() - began
                print(f"{name}: {seconds:.1f} s, {line.strip()}", flush=True)
                run.kill()
                return seconds
    sys.exit(f"startup: {experiment} made no step")


def main(experiment: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = lambda name, programs: seconds_to_the_first_step(experiment, folder, name, programs)
        without = start("without", "off")
        start("first", f"{folder}/programs")
        kept = start("second", f"{folder}/programs")
    print(f"the second start is {without / kept:.1f} times sooner")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(QUICKSTART))
