"""The data sets of the benchmarks, in the directory that the environment variable HISTOVAR_DATA names.

| file or folder | read by |
|---|---|
| ``her2st/paired.h5ad`` | adapt, compare, device, embed, genes, genes_per_step, her2st, journey, trust |
| ``her2st/expression_only.h5ad`` | her2st, units |
| ``her2st/raw/data/ST-imgs``, ``encoders/dinov2_vits14.safetensors`` | embed, journey |
| ``slides/her2st_C3.tif`` | journey |
| ``mob.h5ad`` | adapt, compare, genes_per_step, report, trust |
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "HISTOVAR_DATA"
HER2ST = "her2st/paired.h5ad"
MOB = "mob.h5ad"


def data_path(name: str) -> Path:
    """Path of a file or folder of the data sets; the program ends with one line if it is not there.

    Parameters
    ----------
    name
        Its path in the directory with the data.
    """
    directory = os.environ.get(VARIABLE)
    if not directory:
        raise SystemExit(f"{VARIABLE} is not set: it must name the directory that holds {name}")
    path = Path(directory) / name
    if not path.exists():
        raise SystemExit(f"{VARIABLE}: {directory} does not hold {name}")
    return path
