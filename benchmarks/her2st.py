"""Scores of stage 1 and stage 2 on her2st, with default settings.

- Stage 1 is trained on all patients but one (``expression_only.h5ad``), with 200 genes chosen on them: reconstruction
  of the held-out patient, and how many codes are in use.
- Stage 2 is trained on sections C2, C3 and C4, and predicts C5: scores, time, and how far predictions in bf16 are from
  those in fp32. ``--picture`` draws maps of the three best genes.

The environment variable HISTOVAR_DATA names the directory with the data.

    python benchmarks/her2st.py                 # both tables
    python benchmarks/her2st.py --smoke         # fewer spots and a small model, to see that it runs
    python benchmarks/her2st.py --reference     # also one step of each stage of the reference configuration
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from real_data import HER2ST, data_path
from smoke import quick_options

import histovar as hv

N_GENES = 200
REPS = ["X_squeezenet", "X_squeezenet_wide"]


def stage1(held_out: str, smoke: bool) -> pd.DataFrame:
    """Reconstruction of a patient that stage 1 has not seen."""
    adata = ad.read_h5ad(data_path("her2st/expression_only.h5ad"))
    if smoke:
        kept = adata.obs["section"].isin(["A1", "B1", "C1", "C2"])
        adata = adata[kept & (np.arange(adata.n_obs) % 2 == 0).tolist()].copy()
    query = adata[adata.obs["patient"] == held_out].copy()
    training = adata[adata.obs["patient"] != held_out].copy()
    begin = time.monotonic()
    hv.pp.gene_panel(training, n_genes=N_GENES)
    model = hv.tl.train_stage1(training, library_key="section", **(quick_options(N_GENES) if smoke else {}))
    seconds = time.monotonic() - begin
    hv.tl.tokenize(query, model)
    genes = model.registry["genes"]
    tokens = torch.from_numpy(query.obsm["histovar_tokens"]).long()
    values = query[:, genes].layers["lognorm"].toarray()
    rebuilt = model.decode(tokens).numpy()
    counts = torch.bincount(tokens.flatten(), minlength=model.config.codebook_size)
    return pd.DataFrame(
        {
            "training spots": training.n_obs,
            "held-out spots": query.n_obs,
            "reconstruction PCC": hv.metrics.mean_pearson(rebuilt, values),
            "codes in use, training": int((model.stage1.code_counts.sum(0) > 0).sum()),
            "codes in use, held-out": int((counts > 0).sum()),
            "epochs": len(model.history["stage1"]),
            "seconds": seconds,
        },
        index=[f"stage 1, patient {held_out} held out"],
    ).T


def stage2(held_out: str, smoke: bool, picture: Path | None) -> pd.DataFrame:
    """Scores of a section that stage 2 has not seen, time, and the difference between bf16 and fp32."""
    adata = ad.read_h5ad(data_path(HER2ST))
    training = adata[adata.obs["section"] != held_out].copy()
    query = adata[adata.obs["section"] == held_out].copy()
    options = quick_options(N_GENES) if smoke else {}
    if smoke:
        kept = training.obs["section"].isin(["C2", "C3"])
        training = training[kept & (np.arange(training.n_obs) % 2 == 0)].copy()
    begin = time.monotonic()
    hv.pp.gene_panel(training, n_genes=N_GENES)
    model = hv.tl.train(training, use_rep=REPS, library_key="section", **options)
    trained = time.monotonic()
    hv.tl.predict(query, model)
    predicted = time.monotonic()
    scores = hv.tl.evaluate(query)
    if picture is not None:
        hv.pl.spatial(query, scores["pearson"].nlargest(3).index.tolist(), section=held_out, save=picture)
    summary = query.uns["histovar"]["evaluation"].loc[held_out]
    model.var_stage.head.gate.fill_(1)  # with the gate shut, means would be the prior's, which is fp32 in both
    predictions = [hv.tl.predict(query, model, precision=precision, copy=True) for precision in ("fp32", "bf16")]
    full, half = (hv.get.prediction(one).X for one in predictions)
    others = pd.Series(
        {
            "training, s": trained - begin,
            "prediction, s": predicted - trained,
            "difference of bf16 from fp32, s.d. of genes": float(
                np.abs((half - full) / model.stage1.scales.std.numpy()).mean()
            ),
        }
    )
    return pd.concat([summary, others]).to_frame(f"stage 2, section {held_out} held out")


def reference() -> pd.DataFrame:
    """Train each stage of the reference configuration for one step, and predict 4 spots."""
    adata = ad.read_h5ad(data_path(HER2ST))
    training = adata[adata.obs["section"] == "C2"][:40].copy()
    hv.pp.gene_panel(training, n_genes=200)
    config = hv.ModelConfig.reference()
    begin = time.monotonic()
    model = hv.tl.train(training, use_rep=REPS[0], config=config, max_epochs=1, batch_size=36)
    trained = time.monotonic()
    query = hv.tl.predict(training[:4], model, copy=True)
    return pd.DataFrame(
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps of each stage": len(model.history["stage2"]),
            "predicted": f"{hv.get.prediction(query).shape}",
            "finite": bool(np.isfinite(hv.get.prediction(query).X).all()),
            "training, s": trained - begin,
            "prediction, s": time.monotonic() - trained,
        },
        index=["reference configuration"],
    ).T


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="fewer spots and a small model")
    parser.add_argument("--reference", action="store_true", help="also train the reference configuration for one step")
    parser.add_argument("--patient", default="C", help="patient held out of stage 1")
    parser.add_argument("--section", default="C5", help="section held out of stage 2")
    parser.add_argument("--picture", type=Path, help="image file for the maps")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("histovar").setLevel(logging.INFO)
    tables = [
        stage1(arguments.patient, arguments.smoke),
        stage2(arguments.section, arguments.smoke, arguments.picture),
    ]
    if arguments.reference:
        tables.append(reference())
    for table in tables:
        print(f"\n{table.to_string(float_format=lambda v: f'{v:.4g}')}")
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")


if __name__ == "__main__":
    main()
