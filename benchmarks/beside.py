"""How much two trainings on the same cores slow each other down, with idle threads asleep and spinning.

    python benchmarks/beside.py            # some minutes on two cores
    python benchmarks/beside.py --smoke    # to see that it runs: stage 1, with idle threads asleep

``histovar train`` is run on simulated sections: once alone, then twice at the same time. Each process uses all cores,
so the slower of the two should take twice as long as one alone, and a little more as they share the caches; the target
is at most 2.5 times. Seconds are those of whole processes, imports included.

``passive`` is the command line as it is, which sets ``OMP_WAIT_POLICY=PASSIVE`` before torch is imported. For
``spinning``, torch is imported first, so that its threads spin while they wait, which is OpenMP's default. Nothing else
should run on the machine; its load at the start is printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

import histovar as hv

TARGET = 2.5
PROGRAM = "from histovar.cli import main; main()"
POLICIES = {"passive": PROGRAM, "spinning": f"import torch; {PROGRAM}"}
# Variables that would override the policy under test.
OVERRIDES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def seconds(program: str, command: list[str], scratch: Path, n: int) -> list[float]:
    """Start `n` trainings together, and return the seconds after which each of them ends."""
    environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    start, running, ends = time.perf_counter(), {}, []
    for i in range(n):
        out = scratch / f"model{i}"
        shutil.rmtree(out, ignore_errors=True)
        full = [sys.executable, "-c", program, *command, "--out", str(out)]
        running[i] = subprocess.Popen(
            full, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    waiting = dict(running)
    while waiting:
        for i, process in list(waiting.items()):
            if process.poll() is not None:
                ends.append(time.perf_counter() - start)
                if process.returncode:
                    raise RuntimeError(process.stderr.read() if process.stderr else "training failed")
                del waiting[i]
        time.sleep(0.02)
    return ends


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n-spots", type=int, default=400, help="spots of each of three sections")
    parser.add_argument("--epochs", type=int, help="largest number of epochs of a stage; by default the command line's")
    parser.add_argument("--repeats", type=int, default=1, help="the table has medians over them")
    parser.add_argument("--scratch", type=Path, default=Path("beside_output"), help="directory for data and models")
    parser.add_argument("--smoke", action="store_true", help="stage 1 of a small model, with idle threads asleep")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.n_spots, arguments.epochs = 20, 1
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    n_genes, width = (20, 16) if arguments.smoke else (200, 1024)
    path = arguments.scratch / "sections.h5ad"
    hv.datasets.simulate(3, arguments.n_spots, n_genes, embedding_dim=width, random_state=0).write_h5ad(path)
    command = ["train", str(path), "--gpus", "0", "--use-rep", "X_histology"]
    if arguments.epochs is not None:
        command += ["--epochs", str(arguments.epochs)]
    if arguments.smoke:
        command += ["--training-stage", "1"]
    policies = ["passive"] if arguments.smoke else list(POLICIES)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; 3 sections of {arguments.n_spots} spots", flush=True)
    rows = []
    for _ in range(arguments.repeats):
        for policy in policies:
            program = POLICIES[policy]
            (alone,) = seconds(program, command, arguments.scratch, 1)
            beside = seconds(program, command, arguments.scratch, 2)
            rows.append({"idle threads": policy, "alone, s": alone, "first of two, s": beside[0], "last, s": beside[1]})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby("idle threads", sort=False).median()
    table["last / alone"] = table["last, s"] / table["alone, s"]
    print(table.round(2).to_string())
    met = table.loc["passive", "last / alone"] <= TARGET
    print(f"target of {TARGET} times {'met' if met else 'missed'} with idle threads asleep")


if __name__ == "__main__":
    main()
