"""What a few measured spots of a new section are worth: scores after ``tl.adapt`` to 0, 10, 30 and 100 of them.

    python benchmarks/adapt.py her2st          # each section by those of the others, thinned to 650 counts and shifted
    python benchmarks/adapt.py mob             # each section by those of the other mouse
    python benchmarks/adapt.py simulated --smoke

In every choice of spots fewer are among more, and all are scored on the same spots: those that are never measured.
Means over sections; with them the standard error over choices. Data sets are found by ``--data`` or the environment
variable HISTOVAR_DATA; ``--models`` names a directory where trained models are kept, and taken from if they are there.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from compare import Data, load, thinned
from smoke import quick_options

import histovar as hv

SCORES = ["PCC-200", "PCC-partial", "MSE", "CRPS", "coverage 90"]
SCORES += [f"{name} given depth" for name in ("PCC-200", "CRPS", "coverage 90")]
SHALLOW = {"her2st": 650}


def trained(train: ad.AnnData, data: Data, where: Path | None, smoke: bool) -> hv.TwoStageVARST:
    """A model, trained, or read from where it was kept."""
    if where is not None and where.is_dir():
        return hv.TwoStageVARST.load(where)
    n_genes = min(200, train.n_vars // 2)
    hv.pp.gene_panel(train, n_genes=n_genes, min_fraction=data.min_fraction)
    options = quick_options(n_genes) if smoke else {"enable_progress_bar": False}
    model = hv.tl.train(train, use_rep=data.use_rep, library_key=data.library_key, random_state=0, **options)
    if where is not None:
        model.save(where)
    return model


def curve(section: ad.AnnData, model: hv.TwoStageVARST, sizes: list[int], seed: int) -> Iterator[dict[str, Any]]:
    """Scores on the spots that are never measured, by number of measured ones."""
    order = np.random.default_rng(seed).permutation(section.n_obs)
    unseen = np.sort(order[max(sizes) :])
    for n in sizes:
        section.obs["measured"] = np.isin(np.arange(section.n_obs), order[:n])
        hv.tl.predict(section, hv.tl.adapt(section, model, "measured") if n else model)
        others = section[unseen].copy()
        hv.tl.evaluate(others)
        scores = others.uns["histovar"]["evaluation"].loc["mean"]
        yield {"spots": n, "choice": seed, **{name: scores.get(name, np.nan) for name in SCORES}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default="simulated", choices=["her2st", "mob", "simulated"])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HISTOVAR_DATA", "data")))
    parser.add_argument("--models", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[0, 10, 30, 100])
    parser.add_argument("--choices", type=int, default=5, help="of measured spots")
    parser.add_argument("--out", type=Path, help="CSV of every score")
    parser.add_argument("--smoke", action="store_true", help="simulated sections, one fold, one choice, one epoch")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.smoke:
        arguments.dataset, arguments.choices, arguments.sizes = "simulated", 1, [0, 10]
    options = Namespace(data=arguments.data, smoke=arguments.smoke, curve=False, group_key=None)
    data = load(arguments.dataset, options)
    groups = data.adata.obs[data.group_key].astype(str)
    rows = []
    for group in sorted(groups.unique())[: 1 if arguments.smoke else None]:
        where = None if arguments.models is None else arguments.models / f"{data.name}_{group}"
        model = trained(data.adata[groups != group].copy(), data, where, arguments.smoke)
        query = data.adata[groups == group].copy()
        for label in sorted(query.obs[data.library_key].astype(str).unique()):
            section = query[query.obs[data.library_key].astype(str) == label].copy()
            if data.name in SHALLOW:
                section = thinned(section, data, SHALLOW[data.name])
            for seed in range(arguments.choices):
                rows += [{"section": label, **row} for row in curve(section, model, arguments.sizes, seed)]
                if arguments.out is not None:
                    pd.DataFrame(rows).to_csv(arguments.out, index=False)
    choices = pd.DataFrame(rows).drop(columns="section").groupby(["spots", "choice"]).mean().groupby("spots")
    print(f"{data.name}: {len({row['section'] for row in rows})} sections, {arguments.choices} choices of spots")
    print(choices.mean().round(4).to_string())
    print("standard error over choices")
    print(choices.sem().round(4).to_string())


if __name__ == "__main__":
    main()
