"""Memory and time of training from a zarr store, by the number of spots.

    python benchmarks/stored.py            # 10,000 and 1,000,000 spots: a quarter of an hour on two cores, 7 GB of disk
    python benchmarks/stored.py --smoke    # to see that it runs

Sections of 5,000 spots (a Visium slide has 4,992), 1,024-d embeddings in 16-bit floats, 60 genes. Each size runs in a
process of its own, whose peak memory is given. Every spot is read, its neighbourhoods are averaged, projected,
tokenised and kept on disk; training itself is cut to epochs of 200 batches. The model is a small one (40 genes, one
layer 32 wide, 512 codes).
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from archive import WIDTH, make_store
from smoke import quick_options

import histovar as hv
from histovar.anndata_io import zarr_store

N_GENES, N_PANEL, CHUNK = 60, 40, 4096


def add_expression(path: Path, n_spots: int) -> None:
    """Add counts that depend on the embeddings, chunk by chunk."""
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    ad.io.write_elem(group, "var", pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]))
    counts = group.create_array(
        "X", shape=(n_spots, N_GENES), chunks=(CHUNK, N_GENES), dtype=np.float32, compressors=None, overwrite=True
    )
    counts.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    loadings = np.random.default_rng(0).normal(size=(WIDTH, N_GENES)) / WIDTH**0.5
    for start in range(0, n_spots, CHUNK):
        embedding = group["obsm/X_histology"][start : start + CHUNK].astype(np.float32)  # type: ignore[index]
        rate = np.exp(0.3 * embedding @ loadings + 1).clip(max=50)
        counts[start : start + CHUNK] = np.random.default_rng(start).poisson(rate)
    zarr.consolidate_metadata(path)


def train(path: Path, n_spots: int, smoke: bool) -> None:
    """Train and print time and memory as a line of JSON."""
    start = time.perf_counter()
    adata = zarr_store.read_zarr(path)
    hv.pp.gene_panel(adata, n_genes=N_PANEL)
    config = hv.ModelConfig.default(N_PANEL, WIDTH, width=32, n_layers=1, feedforward=128, codebook_size=512)
    options = {"config": config, "max_epochs": 2, "limit_train_batches": 200, "enable_progress_bar": False}
    options |= quick_options(N_PANEL) if smoke else {}
    model = hv.tl.train(adata, use_rep="X_histology", library_key="section", **options)
    row = {
        "spots": n_spots,
        "seconds": time.perf_counter() - start,
        "GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "inner held-out PCC": float(model.history["stage2"]["val_pcc"].iloc[-1]),
    }
    print(json.dumps(row))


def main() -> None:
    """Run every size in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--spots", nargs="+", type=int, default=[10_000, 1_000_000], help="sizes of the store")
    parser.add_argument("--section-size", type=int, default=5_000, help="spots of a section")
    parser.add_argument("--scratch", type=Path, default=Path("stored_output"), help="directory for the stores")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="600 spots")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.part is not None:
        train(arguments.part, arguments.spots[0], arguments.smoke)
        return
    if arguments.smoke:
        arguments.spots, arguments.section_size = [600], 200
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for n_spots in arguments.spots:
        path = arguments.scratch / f"{n_spots}.zarr"
        if not path.exists():
            make_store(path, n_spots, arguments.section_size, CHUNK)
            add_expression(path, n_spots)
        command = [sys.executable, __file__, "--spots", str(n_spots), "--part", str(path)]
        command += ["--smoke"] * arguments.smoke
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    print(pd.DataFrame(rows).set_index("spots").round(2).to_string())


if __name__ == "__main__":
    main()
