"""Ctrl-C during commands: exit code 130 and one line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faults import Setting

# Until then Python itself starts, whose message for Ctrl-C is its own.
STARTING_SECONDS = 1.0
PROGRAM = "from histovar.cli import main; main()"


def interrupts(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Interrupt commands at random moments."""
    data, model = setting.scratch / "interrupted.h5ad", setting.scratch / "first"
    setting.training.write_h5ad(data)
    columns = ["--use-rep", "X_histology", "--library-key", "section"]
    commands = {
        "predict": ["predict", str(data), "-m", str(model), "--n-samples", "200"],
        "train": ["train", str(data), "--n-genes", "30", "--epochs", "3"],
    }
    for name, command in commands.items():
        out = setting.scratch / ("interrupted_out.h5ad" if name == "predict" else "interrupted_model")
        seconds = 15.0
        for _ in range(max(1, round(10 * share))):
            started = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *command, *columns, "--out", str(out)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                process.wait(setting.rng.uniform(STARTING_SECONDS, seconds))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
            said, complaints = process.communicate(timeout=120)
            if process.returncode == 0:
                seconds = min(seconds, time.monotonic() - started)
                yield f"interrupts, {name}", "whole" if "written" in said or "saved" in said else f"silent: {said}"
                continue
            last = complaints.strip().splitlines()[-1:]
            clean = process.returncode == 130 and last == ["histovar: interrupted"] and "Traceback" not in complaints
            yield f"interrupts, {name}", "refused" if clean else f"{process.returncode}: {complaints[-300:]}"
