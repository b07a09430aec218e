"""Time, memory and accuracy by the number of genes.

    python benchmarks/genes.py                  # time and memory with 200, 2,000 and 18,000 simulated genes
    python benchmarks/genes.py --accuracy       # her2st: the same 200 genes in panels of 200 and of 2,000
    python benchmarks/genes.py --smoke          # to see that it runs

Each size runs in a process of its own, whose peak memory is given. Simulated expression follows 24 programmes that all
genes share. The environment variable HISTOVAR_DATA names the directory with her2st.
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
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from real_data import HER2ST, data_path
from smoke import quick_options

import histovar as hv


def simulated(n_spots: int, n_genes: int, seed: int) -> ad.AnnData:
    """Spots on a grid whose log-normalised expression and embedding follow common programmes."""
    weights = np.random.default_rng(0)
    loadings, sight = weights.normal(size=(24, n_genes)) / 5, weights.normal(size=(24, 128))
    rng = np.random.default_rng(seed)
    side = int(np.ceil(n_spots**0.5))
    place = np.stack(np.divmod(np.arange(n_spots), side), 1).astype(float)
    waves = rng.normal(size=(2, 24)) / side * 6
    programmes = np.sin(place @ waves + rng.uniform(0, 6, 24))
    adata = ad.AnnData(obs=pd.DataFrame(index=np.arange(n_spots).astype(str)), var=pd.DataFrame(index=names(n_genes)))
    adata.obsm["spatial"] = place
    adata.obsm["X_sim"] = (programmes @ sight + rng.normal(size=(n_spots, 128))).astype(np.float32)
    values = programmes.astype(np.float32) @ loadings.astype(np.float32) + 1
    values += rng.normal(size=values.shape).astype(np.float32) / 2
    adata.layers["lognorm"] = values.clip(min=0)
    return adata


def names(n: int) -> list[str]:
    """Names of genes."""
    return [f"gene{i}" for i in range(n)]


def train(n_genes: int, n_training: int, scratch: Path, smoke: bool) -> None:
    """Train one epoch, save the model and print time and memory as a line of JSON."""
    adata = simulated(n_training, n_genes, 1)
    adata.var["histovar_panel"] = True
    options = quick_options(n_genes) if smoke else {"max_epochs": 1, "enable_progress_bar": False}
    start = time.perf_counter()
    model = hv.tl.train(adata, use_rep="X_sim", layer="lognorm", **options)
    training = time.perf_counter() - start
    trained_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    model.save(scratch / f"model_{n_genes}")
    print(json.dumps({"genes": n_genes, "training, s": training, "training, GB": trained_gb}))


def predict(n_genes: int, n_spots: int, scratch: Path) -> None:
    """Predict and print time and memory as a line of JSON."""
    model = hv.TwoStageVARST.load(scratch / f"model_{n_genes}")
    query = simulated(n_spots, 1, 2)
    start = time.perf_counter()
    hv.tl.predict(query, model)
    seconds = time.perf_counter() - start
    gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"genes": n_genes, "spots": n_spots, "prediction, ms a spot": 1e3 * seconds / n_spots, "GB": gb}))


def accuracy(section: str, smoke: bool) -> None:
    """Print the PCC of the same 200 genes, trained on alone and in a panel of 2,000."""
    adata = ad.read_h5ad(data_path(HER2ST))
    training, query = (adata[(adata.obs["section"] == section) == held_out].copy() for held_out in (False, True))
    hv.pp.gene_panel(training, n_genes=200)
    genes = training.var_names[training.var["histovar_panel"]].tolist()
    for n_genes in (200, 2000):
        subset = training.copy()
        if n_genes > 200:
            hv.pp.gene_panel(subset, n_genes=n_genes)
            further = subset.var_names[subset.var["histovar_panel"]].tolist()
            panel = (genes + [g for g in further if g not in set(genes)])[:n_genes]
            subset.var["histovar_panel"] = subset.var_names.isin(panel)
        options = quick_options(n_genes) if smoke else {"enable_progress_bar": False}
        start = time.perf_counter()
        model = hv.tl.train(subset, use_rep=["X_squeezenet", "X_squeezenet_wide"], library_key="section", **options)
        seconds = time.perf_counter() - start
        predicted = hv.tl.predict(query, model, copy=True)
        pcc = hv.tl.evaluate(predicted).loc[genes, "pearson"].mean()
        print(f"{section}, panel of {n_genes}: PCC of the 200 genes {pcc:.4f}, training {seconds:.0f} s", flush=True)


def main() -> None:
    """Run every size in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--genes", nargs="+", type=int, default=[200, 2000, 18000], help="sizes of the panel")
    parser.add_argument("--spots", type=int, default=4000, help="spots to predict")
    parser.add_argument("--training-spots", type=int, default=512, help="spots to train on")
    parser.add_argument("--accuracy", action="store_true", help="accuracy on her2st instead of time and memory")
    parser.add_argument(
        "--sections", nargs="+", default=["C2", "C3", "C4", "C5"], help="held-out sections of --accuracy"
    )
    parser.add_argument("--part", choices=["train", "predict"], help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, default=Path("genes_output"), help="directory for models")
    parser.add_argument("--smoke", action="store_true", help="50 genes, 100 spots")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.smoke:
        arguments.genes, arguments.spots, arguments.training_spots = [50], 100, 100
    if arguments.accuracy:
        for section in arguments.sections:
            accuracy(section, arguments.smoke)
        return
    if arguments.part == "train":
        train(arguments.genes[0], arguments.training_spots, arguments.scratch, arguments.smoke)
        return
    if arguments.part == "predict":
        predict(arguments.genes[0], arguments.spots, arguments.scratch)
        return
    rows = []
    arguments.scratch.mkdir(exist_ok=True)
    for n_genes in arguments.genes:
        row: dict[str, Any] = {}
        for part in ("train", "predict"):
            command = [sys.executable, __file__, "--part", part, "--genes", str(n_genes), "--spots"]
            command += [str(arguments.spots), "--training-spots", str(arguments.training_spots)]
            command += ["--scratch", str(arguments.scratch), *["--smoke"] * arguments.smoke]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(row, flush=True)
    print(pd.DataFrame(rows).set_index("genes").round(2).to_string())


if __name__ == "__main__":
    main()
