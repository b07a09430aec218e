"""How training of the tokens, and what it learns, depend on the number of genes that a step learns.

    python benchmarks/token_training.py her2st                   # all sections, each left out
    python benchmarks/token_training.py mob --genes 200 64       # all animals, some numbers
    python benchmarks/token_training.py simulated --smoke        # to see that it runs

A step of stage 2 learns a random choice of the finest scale's tokens, a third of them by default. For each number of
genes and each group left out, prints the cross-entropy of the group's tokens, each given those before it; the scores of
expected expression and of 20 joint draws; and the epochs and processor time of stage 2, the prior included. The
environment variable HISTOVAR_DATA names the directory with the data.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import anndata as ad
import pandas as pd
import torch
from compare import Data, load, splits
from smoke import quick_options

import histovar as hv
from histovar.anndata_io.histology import histology
from histovar.training import stage2_modules

SCORES = ["PCC-200", "gene-structure correlation of draws"]


@torch.no_grad()
def token_loss(model: hv.TwoStageVARST, query: ad.AnnData, data: Data) -> float:
    """Mean cross-entropy of the true tokens of spots that the model has not seen."""
    query = query.copy()
    hv.tl.tokenize(query, model)
    tokens = torch.from_numpy(query.obsm["histovar_tokens"]).long()
    sections = torch.from_numpy(pd.factorize(query.obs[data.library_key])[0])
    inputs = histology(
        query,
        model.config,
        use_rep=data.use_rep,
        spatial_key="spatial",
        library_key=data.library_key,
        encoders={},
        spacing_um=None,
        key="histovar",
    )
    return float(model.token_loss(model.var_stage.condition.align(inputs, sections), tokens).mean())


def measured(train: ad.AnnData, query: ad.AnnData, data: Data, n_genes: int, quick: dict[str, Any]) -> dict[str, Any]:
    """One training: loss, scores and seconds."""
    stage2_modules.LEAST_GENES = stage2_modules.MOST_GENES = n_genes
    model = hv.tl.train_stage1(train, library_key=data.library_key, random_state=0, **quick)
    begin = time.process_time()
    hv.tl.train_stage2(train, model, use_rep=data.use_rep, library_key=data.library_key, random_state=0, **quick)
    seconds = time.process_time() - begin
    predicted = hv.tl.predict(query, model, n_samples=20, copy=True)
    assert predicted is not None
    hv.tl.evaluate(predicted)
    scores = predicted.uns["histovar"]["evaluation"].loc["mean"]
    epochs = len(model.history["stage2"])
    return {
        "genes a step": n_genes,
        "loss of tokens": token_loss(model, query, data),
        **{name: scores[name] for name in SCORES if name in scores},
        "epochs": epochs,
        "stage 2, CPU s": seconds,
    }


def main() -> None:
    """Print a row for each number of genes and group left out, and their means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dataset", help="her2st, her2st_dinov2, mob, mob_dinov2 or simulated")
    parser.add_argument("--genes", nargs="+", type=int, default=[200, 64, 32])
    parser.add_argument("--folds", type=int, help="only so many groups left out")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.smoke:
        arguments.folds, arguments.genes = 1, [64]
    options = argparse.Namespace(smoke=arguments.smoke, curve=False, group_key=None, use_rep=None)
    data = load(arguments.dataset, options)
    rows = []
    for group, train, query in splits(data, arguments.folds, pairs=False):
        panel = min(200, train.n_vars // 2)
        hv.pp.gene_panel(train, n_genes=panel, min_fraction=data.min_fraction)
        quick = quick_options(panel) if arguments.smoke else {"enable_progress_bar": False}
        for n_genes in arguments.genes:
            rows.append({"left out": group, **measured(train.copy(), query, data, n_genes, quick)})
            print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    print(pd.DataFrame(rows).groupby("genes a step", sort=False).mean(numeric_only=True).round(4).to_string())


if __name__ == "__main__":
    main()
