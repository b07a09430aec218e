"""Whether genes can be trusted as far as ``hv.get.genes`` says.

Sections (of her2st's patient C) or mice (of mob) are left out in turn. A model trained on the others says which
correlation to expect of every gene on a new section, and between which bounds; the section that was left out says what
it is. Then the same training with half of the panel's genes made to have no pattern of their own: the counts of a
quarter shuffled among the spots of each section, those of another quarter reordered as a smooth random field, as noise
with the autocorrelation of tissue. How many of them have a q-value below 0.1, out of all that have?

    python benchmarks/trust.py her2st mob              # every fold, two trainings each: some minutes a training
    python benchmarks/trust.py her2st --folds C2       # one of them
    python benchmarks/trust.py simulated --smoke       # to see that it runs

The data are found by ``--data`` or the environment variable HISTOVAR_DATA.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from compare import NAMED
from numpy.typing import NDArray
from scipy import sparse
from scipy.ndimage import gaussian_filter, map_coordinates
from smoke import quick_options

import histovar as hv

# Of a section's longer side, the width of a random field's hills.
SMOOTH = 0.15


class DataSet(NamedTuple):
    """Sections, their embeddings, the column of what is left out, and in how many spots a gene must be found."""

    adata: ad.AnnData
    use_rep: list[str]
    column: str
    min_fraction: float


def read(name: str, data: Path) -> DataSet:
    """A data set by its name."""
    if name == "simulated":
        return DataSet(hv.datasets.simulate(4, 60, 40, embedding_dim=16), ["X_histology"], "section", 0.0)
    known = NAMED[name]
    return DataSet(ad.read_h5ad(data / known.file), known.use_rep, known.group_key, known.min_fraction)


def trained(training: ad.AnnData, data: DataSet, seed: int, smoke: bool) -> hv.TwoStageVARST:
    """A model with default settings; in smoke mode a small one."""
    n_genes = int(training.var["histovar_panel"].sum())
    options = quick_options(n_genes) if smoke else {"enable_progress_bar": False}
    return hv.tl.train(training, use_rep=data.use_rep, library_key="section", random_state=seed, **options)


def realised(query: ad.AnnData, model: hv.TwoStageVARST) -> Iterator[tuple[str, dict[str, Any]]]:
    """How expected correlations compare with those on each section that was left out."""
    table = hv.get.genes(model)
    z = np.arctanh(np.array(model.registry["trust"]["pearson"], dtype=float))
    for section in query.obs["section"].astype(str).unique():
        one = hv.tl.predict(query[query.obs["section"] == section].copy(), model, copy=True)
        found = hv.tl.evaluate(one)["pearson"].dropna()
        of = table.loc[found.index]
        yield (
            section,
            {
                "expected": of["expected_pearson"].mean(),
                "realised": found.mean(),
                "correlation": np.corrcoef(of["expected_pearson"], found)[0, 1],
                "within": found.between(of["lower"], of["upper"]).mean(),
                "below": (found < of["lower"]).mean(),
                "above": (found > of["upper"]).mean(),
                "width": (of["upper"] - of["lower"]).mean(),
                "q < 0.1": int((table["q_value"] < 0.1).sum()),
                "groups apart": np.nanmean(z, axis=1).std(ddof=1),
                "ceiling": table["ceiling"].mean(),
                "for": table.attrs["expected on"].split(";")[0],
            },
        )


def random_field(place: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.float64]:
    """A smooth random field at some places."""
    size = 64
    reach = int(4 * SMOOTH * size)  # hills wrap around beyond the section
    field = gaussian_filter(rng.normal(size=(size + reach, size + reach)), SMOOTH * size, mode="wrap")
    at = (place - place.min(0)) / np.ptp(place, axis=0).max() * (size - 1)
    values: NDArray[np.float64] = map_coordinates(field / field.std(), at.T, order=1)
    return values


def without_pattern(training: ad.AnnData, seed: int) -> tuple[ad.AnnData, pd.Series]:
    """Training sections in which half of the panel's genes have no pattern of their own, and which those are."""
    rng = np.random.default_rng(seed)
    panel = rng.permutation(training.var_names[training.var["histovar_panel"]])
    quarter = len(panel) // 4
    kinds = pd.Series("real", index=panel)
    kinds[panel[:quarter]], kinds[panel[quarter : 2 * quarter]] = "shuffled", "smooth"
    changed = ad.AnnData(training.X.copy(), obs=training.obs, var=training.var[["histovar_panel"]])
    changed.obsm.update({key: training.obsm[key] for key in training.obsm if not key.startswith("histovar")})
    counts = sparse.lil_matrix(training.X)
    for section in training.obs["section"].unique():
        rows = np.flatnonzero(training.obs["section"] == section)
        place = np.asarray(training.obsm["spatial"][rows], dtype=float)
        for gene in panel[: 2 * quarter]:
            column = training.var_names.get_loc(gene)
            values = counts[rows, column].toarray()[:, 0]
            if kinds[gene] == "shuffled":
                values = rng.permutation(values)
            else:
                values = np.sort(values)[(random_field(place, rng)).argsort().argsort()]
            counts[rows, column] = values[:, None]
    changed.X = sparse.csr_matrix(counts, dtype=np.float32)
    return changed, kinds


def discoveries(table: pd.DataFrame, kinds: pd.Series) -> dict[str, Any]:
    """How many genes of each kind have a q-value below 0.1."""
    found = table["q_value"] < 0.1
    kinds = kinds[table.index]
    counts = {
        f"{kind}, q < 0.1": f"{int(found[kinds == kind].sum())} of {int((kinds == kind).sum())}"
        for kind in sorted(set(kinds))
    }
    return {**counts, "false share": float((kinds[found] != "real").mean()) if found.any() else 0.0}


def main() -> None:
    """Print a table of what was expected and found, and one of false discoveries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="her2st, mob (both by default) or simulated")
    parser.add_argument("--folds", nargs="+", help="sections or mice to leave out; each in turn by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HISTOVAR_DATA", "../shared/data")))
    parser.add_argument("--smoke", action="store_true", help="one fold of simulated sections, one epoch")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    accuracy, false = {}, {}
    for name in ["simulated"] if arguments.smoke else arguments.names or ["her2st", "mob"]:
        data = read(name, arguments.data)
        groups = data.adata.obs[data.column].astype(str)
        for fold in arguments.folds or (["S4"] if arguments.smoke else sorted(groups.unique())):
            training, query = data.adata[groups != fold].copy(), data.adata[groups == fold].copy()
            n_genes = min(200, data.adata.n_vars // 2)
            hv.pp.gene_panel(training, n_genes=n_genes, min_fraction=data.min_fraction)
            changed, kinds = without_pattern(training, arguments.seed)
            model = trained(training, data, arguments.seed, arguments.smoke)
            for section, row in realised(query, model):
                accuracy[name, fold, section] = row
                print(name, fold, section, row, flush=True)
            model = trained(changed, data, arguments.seed, arguments.smoke)
            false[name, fold] = discoveries(hv.get.genes(model), kinds)
            print(name, fold, false[name, fold], flush=True)
    for rows in (accuracy, false):
        print(f"\n{pd.DataFrame(rows).T.to_string(float_format=lambda value: f'{value:.3f}')}")


if __name__ == "__main__":
    main()
