"""Compare the correlations that ``hv.get.genes`` expects with those on held-out sections; count false discoveries.

Each section (of her2st's patient C) or mouse (of mob) is left out in turn. A model of the others states the correlation
to expect of every gene on a new section, with an interval; the section that was left out shows the correlation reached.

The model is then trained again with half of the panel's genes deprived of any pattern of their own: counts of a quarter
are shuffled among the spots of each section, those of another quarter reordered to follow a smooth random field, as
noise that is autocorrelated like tissue. Among genes with a q-value below 0.1, these are the false discoveries.

    python benchmarks/trust.py her2st mob              # every fold; two trainings of some minutes each
    python benchmarks/trust.py her2st --folds C2       # one of them
    python benchmarks/trust.py simulated --smoke       # to see that it runs

The environment variable HISTOVAR_DATA names the directory with the data.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from compare import NAMED
from numpy.typing import NDArray
from real_data import data_path
from scipy import sparse
from scipy.ndimage import gaussian_filter, map_coordinates
from smoke import quick_options

import histovar as hv

# Standard deviation of the smoothing of a random field, as a share of the section's longer side.
SMOOTH = 0.15


class DataSet(NamedTuple):
    """Sections, their embeddings, the column of what is left out, the smallest share of spots that detect a gene."""

    adata: ad.AnnData
    use_rep: list[str]
    column: str
    min_fraction: float


def read(name: str) -> DataSet:
    """Read a data set by its name."""
    if name == "simulated":
        return DataSet(hv.datasets.simulate(4, 60, 40, embedding_dim=16), ["X_histology"], "section", 0.0)
    known = NAMED[name]
    return DataSet(ad.read_h5ad(data_path(known.file)), known.use_rep, known.group_key, known.min_fraction)


def train(training: ad.AnnData, data: DataSet, seed: int, smoke: bool) -> hv.TwoStageVARST:
    """Train a model with default settings; in smoke mode a small one."""
    n_genes = int(training.var["histovar_panel"].sum())
    options = quick_options(n_genes) if smoke else {"enable_progress_bar": False}
    return hv.tl.train(training, use_rep=data.use_rep, library_key="section", random_state=seed, **options)


def expected_and_observed(query: ad.AnnData, model: hv.TwoStageVARST) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compare expected correlations with those observed on each held-out section."""
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
                "observed": found.mean(),
                "correlation": np.corrcoef(of["expected_pearson"], found)[0, 1],
                "in interval": found.between(of["lower"], of["upper"]).mean(),
                "below it": (found < of["lower"]).mean(),
                "above it": (found > of["upper"]).mean(),
                "width of interval": (of["upper"] - of["lower"]).mean(),
                "q < 0.1": int((table["q_value"] < 0.1).sum()),
                "s.d. of groups": np.nanmean(z, axis=1).std(ddof=1),
                "ceiling": table["ceiling"].mean(),
                "for": table.attrs["expected on"].split(";")[0],
            },
        )


def random_field(place: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.float64]:
    """Values of a smooth random field at the spots."""
    size = 64
    reach = int(4 * SMOOTH * size)  # hills wrap around beyond the section
    field = gaussian_filter(rng.normal(size=(size + reach, size + reach)), SMOOTH * size, mode="wrap")
    at = (place - place.min(0)) / np.ptp(place, axis=0).max() * (size - 1)
    values: NDArray[np.float64] = map_coordinates(field / field.std(), at.T, order=1)
    return values


def without_pattern(training: ad.AnnData, seed: int) -> tuple[ad.AnnData, pd.Series]:
    """Copy the training sections, deprive half of the panel's genes of their pattern, and return each gene's kind."""
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
    """Count the genes of each kind with a q-value below 0.1."""
    found = table["q_value"] < 0.1
    kinds = kinds[table.index]
    counts = {
        f"{kind}, q < 0.1": f"{int(found[kinds == kind].sum())} of {int((kinds == kind).sum())}"
        for kind in sorted(set(kinds))
    }
    return {**counts, "share of false discoveries": float((kinds[found] != "real").mean()) if found.any() else 0.0}


def main() -> None:
    """Print a table of expected and observed correlations, and one of false discoveries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="her2st, mob (both by default) or simulated")
    parser.add_argument("--folds", nargs="+", help="sections or mice to leave out; each in turn by default")
    parser.add_argument("--seed", type=int, default=0, help="of training and of the genes without pattern")
    parser.add_argument("--smoke", action="store_true", help="one fold of simulated sections, one epoch")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    accuracy, false = {}, {}
    for name in ["simulated"] if arguments.smoke else arguments.names or ["her2st", "mob"]:
        data = read(name)
        groups = data.adata.obs[data.column].astype(str)
        for fold in arguments.folds or (["S4"] if arguments.smoke else sorted(groups.unique())):
            training, query = data.adata[groups != fold].copy(), data.adata[groups == fold].copy()
            n_genes = min(200, data.adata.n_vars // 2)
            hv.pp.gene_panel(training, n_genes=n_genes, min_fraction=data.min_fraction)
            changed, kinds = without_pattern(training, arguments.seed)
            model = train(training, data, arguments.seed, arguments.smoke)
            for section, row in expected_and_observed(query, model):
                accuracy[name, fold, section] = row
                print(name, fold, section, row, flush=True)
            model = train(changed, data, arguments.seed, arguments.smoke)
            false[name, fold] = discoveries(hv.get.genes(model), kinds)
            print(name, fold, false[name, fold], flush=True)
    for rows in (accuracy, false):
        print(f"\n{pd.DataFrame(rows).T.to_string(float_format=lambda value: f'{value:.3f}')}")


if __name__ == "__main__":
    main()
