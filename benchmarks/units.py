"""How much patients differ: in the counts that a gene panel takes, in genes' rates and in depth.

Panels are chosen on one patient of her2st's expression (HISTOVAR_DATA names the directory with the data), and looked at
in every section of all patients: by which factor the panel's median total in a spot lies outside that of 90 % of the
training spots. ``histovar.anndata_io.expression`` warns of factors above any of these.

Then, of the 200 most variable genes of all patients, the standard deviation of log rates (medians over genes) and of
mean log depth, between sections of a patient and between patients: what ``histovar.model.observation`` expects before
it has seen groups of its own.

    python benchmarks/units.py [--smoke]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import histovar as hv
from histovar._keys import LOGNORM
from histovar.anndata_io.expression import expression
from histovar.anndata_io.normalization import Normalization

N_GENES = 200


def normalization(adata: ad.AnnData, genes: pd.Index) -> Normalization:
    """How much of the expression is the panel's."""
    totals = expression(adata, LOGNORM, adata.var_names.get_indexer(genes)).totals["all"]
    return totals.normalization(LOGNORM, adata.n_vars, len(genes))


def factors(adata: ad.AnnData, patient: str) -> pd.Series:
    """By which factor each section lies outside a patient's training spots; below 1 within them."""
    training = adata[adata.obs["patient"] == patient].copy()
    hv.pp.gene_panel(training, n_genes=min(N_GENES, adata.n_vars // 2))
    genes = training.var_names[training.var["histovar_panel"]]
    trained = normalization(training, genes)
    found = {}
    for section in adata.obs["section"].unique():
        middle = normalization(adata[adata.obs["section"] == section].copy(), genes).panel_median
        found[section] = max(middle / trained.panel_high, trained.panel_low / middle)
    return pd.Series(found)


def apart(adata: ad.AnnData) -> pd.DataFrame:
    """Standard deviations between sections of a patient, and between patients."""
    adata = adata.copy()
    hv.pp.gene_panel(adata, n_genes=min(N_GENES, adata.n_vars // 2))
    totals = np.asarray(adata.X.sum(1)).ravel()
    panel = adata.X[:, np.flatnonzero(adata.var["histovar_panel"])]

    def groups(column: str) -> tuple[pd.DataFrame, pd.Series]:
        names = adata.obs[column].astype(str).to_numpy()
        rows = {name: names == name for name in np.unique(names)}
        # Half a count more, for genes that were not measured.
        rates = {n: np.log((np.asarray(panel[r].sum(0)).ravel() + 0.5) / totals[r].sum()) for n, r in rows.items()}
        depth = {name: np.log(totals[r].clip(1)).mean() for name, r in rows.items()}
        return pd.DataFrame(rates).T, pd.Series(depth)

    patient = adata.obs.astype(str).drop_duplicates("section").set_index("section")["patient"]
    (rates, depth), (of_patients, depth_of_patients) = groups("section"), groups("patient")
    within = [values.groupby(patient).var().mean() ** 0.5 for values in (rates, depth)]
    return pd.DataFrame(
        {
            "log rate": [within[0].median(), of_patients.std().median()],
            "log depth": [within[1], depth_of_patients.std()],
        },
        index=["between sections", "between patients"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="simulated sections, to see that it runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        adata = hv.datasets.simulate(4, 60, 40, embedding_dim=4)
        adata.obs["patient"] = np.where(adata.obs["section"].isin(["S1", "S2"]), "A", "B")
    else:
        data = Path(os.environ.get("HISTOVAR_DATA", Path(__file__).parents[2] / "shared" / "data"))
        adata = ad.read_h5ad(data / "her2st" / "expression_only.h5ad")
    table = pd.DataFrame({patient: factors(adata, patient) for patient in adata.obs["patient"].unique()})
    print(pd.DataFrame({"median": table.median(), "largest": table.max(), "of section": table.idxmax()}).to_string())
    print(f"largest of {table.size} pairs: {table.max().max():.2f}")
    print(apart(adata).to_string(float_format=lambda value: f"{value:.2f}"))


if __name__ == "__main__":
    main()
