"""How much of the counts a gene panel takes, from patient to patient: what tells other units from another patient.

Panels are chosen on one patient of her2st's expression (HISTOVAR_DATA names the directory with the data), and looked at
in every section of all patients: by which factor the panel's total in the middle spot lies outside that of 90 % of the
training spots. ``histovar.anndata_io.expression`` warns of factors above any of these.

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
from histovar.anndata_io.expression import Normalization, expression

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


if __name__ == "__main__":
    main()
