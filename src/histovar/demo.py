"""Run the whole workflow on simulated sections: train, predict, score, plot."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from histovar import datasets, metrics, pl, pp, tl

HELD_OUT = "S4"
EMBEDDING = "X_histology"


def run(out: str | Path, *, n_spots: int = 400, random_state: int = 0) -> str:
    """Train on three simulated sections, predict the fourth, score and plot it.

    Parameters
    ----------
    out
        Directory for ``map.png``, ``training.png``, ``prediction.h5ad``, ``metrics.csv``, ``summary.json``, ``model``.
    n_spots
        Spots of each section.
    random_state
        Seed.

    Returns
    -------
    str
        Scores in words, beside those of ridge regression on the same split, genes and embeddings.
    """
    start = time.monotonic()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    adata = datasets.simulate(n_spots=n_spots, random_state=random_state)
    training = adata[adata.obs["section"] != HELD_OUT].copy()
    query = adata[adata.obs["section"] == HELD_OUT].copy()

    n_genes = min(200, adata.n_vars)
    pp.gene_panel(training, n_genes=n_genes, min_fraction=0.0, library_key="section")
    pp.gene_scales(training)
    model = tl.train(training, use_rep=EMBEDDING, library_key="section", random_state=random_state)
    tl.predict(query, model)
    scores = tl.evaluate(query)
    seconds = time.monotonic() - start

    best = scores["pearson"].nlargest(3).index.tolist()
    pl.spatial(query, best, section=HELD_OUT, save=out / "map.png")
    pl.training(model, save=out / "training.png")
    scores.to_csv(out / "metrics.csv")
    query.write_h5ad(out / "prediction.h5ad")
    model.save(out / "model")

    ridge = tl.baseline(training, "ridge", use_rep=EMBEDDING, library_key="section")
    ridge.predict(query)
    model_scores = metrics.summary(scores)
    ridge_scores = metrics.summary(tl.evaluate(query, key="ridge"))
    summary = {"histovar": model_scores, "ridge": ridge_scores, "seconds": seconds}
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    name = "PCC-200" if "PCC-200" in model_scores and not math.isnan(model_scores["PCC-200"]) else "PCC-all"
    return (
        f"section {HELD_OUT}, trained on the other three in {seconds:.0f} s:\n"
        f"  histovar {name} {model_scores[name]:.3f}, MSE {model_scores['MSE']:.3f}; "
        f"ridge {name} {ridge_scores[name]:.3f}, MSE {ridge_scores['MSE']:.3f}\n"
        f"map, scores, prediction and model in {out}"
    )
