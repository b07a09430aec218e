"""How training, and what it learns, depend on the number of genes that a training step takes.

    python benchmarks/genes_per_step.py her2st                   # all sections, each left out
    python benchmarks/genes_per_step.py mob --genes 200 66       # all animals, some numbers
    python benchmarks/genes_per_step.py simulated --smoke        # to see that it runs

Each step takes a random choice of the panel's genes, by default a third: in stage 1 of those that are reconstructed, in
stage 2 of the finest scale's tokens. For each number of genes and each group left out, prints the correlation of the
reconstruction of the group's expression; the cross-entropy of its tokens, each given those before it; the scores of
expected expression and of 20 joint draws; and the processor time of both stages, the prior included. Tokens are those
of each model's own codebook, so that their losses can be compared roughly. The environment variable HISTOVAR_DATA names
the directory with the data.
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
from histovar.anndata_io.matrix import dense
from histovar.training import stage1, stage2_modules

SCORES = ["PCC-200", "gene-structure correlation of draws"]


@torch.no_grad()
def token_scores(model: hv.TwoStageVARST, query: ad.AnnData, data: Data) -> dict[str, float]:
    """Reconstruction and predictability of the tokens of spots that the model has not seen."""
    query = query.copy()
    hv.tl.tokenize(query, model)
    tokens = torch.from_numpy(query.obsm["histovar_tokens"]).long()
    measured = dense(query[:, model.registry["genes"]].layers["lognorm"])
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
    loss = model.token_loss(model.var_stage.condition.align(inputs, sections), tokens)
    return {
        "reconstruction PCC": hv.metrics.mean_pearson(model.decode(tokens).numpy(), measured),
        "loss of tokens": float(loss.mean()),
    }


def measure(train: ad.AnnData, query: ad.AnnData, data: Data, n_genes: int, quick: dict[str, Any]) -> dict[str, Any]:
    """Train once; return scores and seconds."""
    stage1.genes_per_step = stage2_modules.genes_per_step = lambda panel, most: min(panel, n_genes)
    begin = time.process_time()
    model = hv.tl.train_stage1(train, library_key=data.library_key, random_state=0, **quick)
    between = time.process_time()
    hv.tl.train_stage2(train, model, use_rep=data.use_rep, library_key=data.library_key, random_state=0, **quick)
    end = time.process_time()
    predicted = hv.tl.predict(query, model, n_samples=20, copy=True)
    assert predicted is not None
    hv.tl.evaluate(predicted)
    scores = predicted.uns["histovar"]["evaluation"].loc["mean"]
    return {
        "genes per step": n_genes,
        **token_scores(model, query, data),
        **{name: scores[name] for name in SCORES if name in scores},
        "stage 1, CPU s": between - begin,
        "stage 2, CPU s": end - between,
    }


def main() -> None:
    """Print a row for each number of genes and group left out, and their means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dataset", help="her2st, her2st_dinov2, mob, mob_dinov2 or simulated")
    parser.add_argument("--genes", nargs="+", type=int, default=[200, 66, 32], help="numbers of genes per step")
    parser.add_argument("--folds", type=int, help="leave only so many groups out")
    parser.add_argument("--smoke", action="store_true", help="a small model, one fold")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.smoke:
        arguments.folds, arguments.genes = 1, [64]
    data = load(arguments.dataset, argparse.Namespace(smoke=arguments.smoke, curve=False, group_key=None, use_rep=None))
    rows = []
    for group, train, query in splits(data, arguments.folds, pairs=False):
        panel = min(200, train.n_vars // 2)
        hv.pp.gene_panel(train, n_genes=panel, min_fraction=data.min_fraction)
        quick = quick_options(panel) if arguments.smoke else {"enable_progress_bar": False}
        for n_genes in arguments.genes:
            rows.append({"left out": group, **measure(train.copy(), query, data, n_genes, quick)})
            texts = (
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in rows[-1].items()
            )
            print(", ".join(texts), flush=True)
    print(pd.DataFrame(rows).groupby("genes per step", sort=False).mean(numeric_only=True).round(4).to_string())


if __name__ == "__main__":
    main()
