"""Run the smoke modes of several benchmarks one after another, in one process that imports everything once.

    python benchmarks/smoke_modes.py trust adapt "compare simulated --methods histovar"

Each argument is the name of a benchmark, with its arguments other than ``--smoke``. Benchmarks that kill processes or
measure whole ones are to be run on their own.
"""

from __future__ import annotations

import runpy
import shlex
import sys
import time
from pathlib import Path


def main() -> None:
    """Run all, and print the seconds that each takes."""
    for command in sys.argv[1:]:
        name, *options = shlex.split(command)
        path = Path(__file__).with_name(f"{name}.py")
        print(f"\n== {command}", flush=True)
        start, processor = time.perf_counter(), time.process_time()
        sys.argv = [str(path), *options, "--smoke"]
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        print(f"== {name}: {seconds:.0f} s, {processor:.0f} s of this process", flush=True)


if __name__ == "__main__":
    main()
