"""How much a few measured spots of a new section improve its prediction: scores after ``tl.adapt``.

    python benchmarks/adapt.py her2st          # predict each section, thinned and shifted, from the other three
    python benchmarks/adapt.py mob             # predict the sections of each mouse from the other
    python benchmarks/adapt.py simulated --smoke

Measured spots are drawn at random, 0, 10, 30 and 100 of them, each set within the next larger one. All predictions are
scored on the same spots, which are in none of the sets. Scores are means over sections; the second table has their
standard error over several random choices of spots. The environment variable HISTOVAR_DATA names the directory with
the data.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from compare import Data, load, thin
from smoke import quick_options

import histovar as hv

SCORES = ["PCC-200", "PCC-partial", "MSE", "CRPS", "coverage 90"]
SCORES += [f"{name} given depth" for name in ("PCC-200", "CRPS", "coverage 90")]
# Median total count to which a data set's held-out section is thinned.
THINNED_TO = {"her2st": 650}


def load_or_train(train: ad.AnnData, data: Data, path: Path | None, smoke: bool) -> hv.TwoStageVARST:
    """Load the model at a path; if there is none, train it and save it there."""
    if path is not None and path.is_dir():
        return hv.TwoStageVARST.load(path)
    n_genes = min(200, train.n_vars // 2)
    hv.pp.gene_panel(train, n_genes=n_genes, min_fraction=data.min_fraction)
    options = quick_options(n_genes) if smoke else {"enable_progress_bar": False}
    model = hv.tl.train(train, use_rep=data.use_rep, library_key=data.library_key, random_state=0, **options)
    if path is not None:
        model.save(path)
    return model


def scores_by_size(
    section: ad.AnnData, model: hv.TwoStageVARST, sizes: list[int], seed: int
) -> Iterator[dict[str, Any]]:
    """Scores on the spots that are never measured, for each number of measured spots."""
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
    parser.add_argument("--models", type=Path, help="directory of trained models, to reuse or to save there")
    parser.add_argument("--sizes", nargs="+", type=int, default=[0, 10, 30, 100], help="numbers of measured spots")
    parser.add_argument("--choices", type=int, default=5, help="random choices of the measured spots")
    parser.add_argument("--out", type=Path, help="CSV file for every score")
    parser.add_argument("--smoke", action="store_true", help="simulated sections, one fold, one choice, one epoch")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.smoke:
        arguments.dataset, arguments.choices, arguments.sizes = "simulated", 1, [0, 10]
    options = Namespace(smoke=arguments.smoke, curve=False, group_key=None)
    data = load(arguments.dataset, options)
    groups = data.adata.obs[data.group_key].astype(str)
    rows = []
    for group in sorted(groups.unique())[: 1 if arguments.smoke else None]:
        path = None if arguments.models is None else arguments.models / f"{data.name}_{group}"
        model = load_or_train(data.adata[groups != group].copy(), data, path, arguments.smoke)
        query = data.adata[groups == group].copy()
        for label in sorted(query.obs[data.library_key].astype(str).unique()):
            section = query[query.obs[data.library_key].astype(str) == label].copy()
            if data.name in THINNED_TO:
                section = thin(section, data, THINNED_TO[data.name])
            for seed in range(arguments.choices):
                rows += [{"section": label, **row} for row in scores_by_size(section, model, arguments.sizes, seed)]
                if arguments.out is not None:
                    pd.DataFrame(rows).to_csv(arguments.out, index=False)
    choices = pd.DataFrame(rows).drop(columns="section").groupby(["spots", "choice"]).mean().groupby("spots")
    print(f"{data.name}: {len({row['section'] for row in rows})} sections, {arguments.choices} choices of spots")
    print(choices.mean().round(4).to_string())
    print("standard error over choices")
    print(choices.sem().round(4).to_string())


if __name__ == "__main__":
    main()
