"""Every method on the same splits, panel and embeddings, in one run.

    python benchmarks/compare.py her2st                    # leave one section out
    python benchmarks/compare.py mob                       # leave one mouse out
    python benchmarks/compare.py her2st --ablations        # histovar without one part at a time
    python benchmarks/compare.py her2st --units log_counts # trained and scored on log1p of the counts themselves
    python benchmarks/compare.py her2st --curve            # learning curve over the number of training spots
    python benchmarks/compare.py simulated --curve         # up to 20,000 simulated spots
    python benchmarks/compare.py her2st --shallow          # held-out section thinned to 650 counts, embeddings shifted
    python benchmarks/compare.py my.h5ad --use-rep X_uni --library-key section --group-key patient
    python benchmarks/compare.py her2st --methods MLP --update  # anew for some methods, in the results of a run before
    python benchmarks/compare.py simulated --smoke         # minutes: to see that it runs

Tables go to standard output and, with every score, to ``--out`` as CSV, with a plot. Named data sets are found by
``--data`` or the environment variable HISTOVAR_DATA. Peak memory is that of the whole process so far, in the order run.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import sparse

import histovar as hv
from histovar.baselines import METHODS

BASELINES = {
    "ridge, HEST recipe": ("ridge_hest", "training"),
    "ridge, tuned": ("ridge", "training"),
    "ridge, tuned, per section": ("ridge", "section"),
    "PLS": ("pls", "training"),
    "kernel ridge": ("kernel_ridge", "training"),
    "kNN retrieval": ("knn", "training"),
    "MLP": ("mlp", "training"),
    "MLP, per section": ("mlp", "section"),
    "MFBP": ("mfbp", "training"),
    "VAR_ST": ("var_st", "training"),
}
RANDOM = {"MLP"}
TRAINING = "training sections, measured"
NOISE = "sampling noise of held-out spots"
OURS = "histovar"
# The reference with one layer, a narrower feed-forward, fewer codes and in scale order, which two CPU cores can train.
REFERENCE_CUT = {
    "width": 640,
    "n_layers": 1,
    "feedforward": 256,
    "codebook_size": 256,
    "dropout": 0.1,
    "order": "scale",
}
COLUMNS = [
    *("PCC-10", "PCC-50", "PCC-200", "PCC-partial", "Spearman", "MSE", "MAE", "RVD", "RVD of draws"),
    *("correlation error", "correlation error of draws", "CRPS", "coverage 90", "training, s", "prediction, s", "GB"),
]


@dataclass
class Data:
    """A data set and how it is split."""

    name: str
    adata: ad.AnnData
    use_rep: list[str]
    library_key: str
    group_key: str
    min_fraction: float = 0.1


@dataclass
class Ablation:
    """histovar with one thing changed."""

    config: dict[str, Any]
    decoding: str = "expected"
    shuffle_genes: bool = False


ABLATIONS = {
    "without niche": Ablation({"n_neighbors": ()}),
    "without prior": Ablation({"n_members": 0}),
    "without residual scales": Ablation({"residual": False, "components": (1, 1, 1, 1)}),
    "arbitrary gene order": Ablation({}, shuffle_genes=True),
    "standardised by training": Ablation({"standardize": "training"}),
    "token order": Ablation({"order": "token"}),
    "codebook of 512": Ablation({"codebook_size": 512}),
    "arg-max decoding": Ablation({}, decoding="greedy"),
    "one sample": Ablation({}, decoding="sample"),
}


def load(name: str, arguments: argparse.Namespace) -> Data:
    """A data set by name, or a file."""
    root = arguments.data
    if name == "simulated":
        n_spots = 150 if arguments.smoke else 5000 if arguments.curve else 400
        adata = hv.datasets.simulate(n_sections=5 if arguments.curve else 4, n_spots=n_spots, random_state=0)
        return Data(name, adata, ["X_histology"], "section", "section", 0.05)
    if name == "her2st":
        adata = ad.read_h5ad(root / "her2st" / "paired.h5ad")
        return Data(name, adata, ["X_squeezenet", "X_squeezenet_wide"], "section", arguments.group_key or "section")
    if name == "mob":
        adata = ad.read_h5ad(root / "mob.h5ad")
        reps = ["X_densenet121_112um", "X_densenet121_224um"]
        return Data(name, adata, reps, "section", arguments.group_key or "animal", 0.2)
    if not arguments.use_rep:
        raise SystemExit("--use-rep: say which obsm keys of the file hold embeddings")
    adata = ad.read_h5ad(name)
    return Data(
        Path(name).stem, adata, arguments.use_rep, arguments.library_key, arguments.group_key or arguments.library_key
    )


def splits(data: Data, n_folds: int | None) -> Iterator[tuple[str, ad.AnnData, ad.AnnData]]:
    """Leave one group out: its name, training and held-out spots."""
    groups = data.adata.obs[data.group_key].astype(str)
    for group in sorted(groups.unique())[:n_folds]:
        yield group, data.adata[(groups != group).to_numpy()].copy(), data.adata[(groups == group).to_numpy()].copy()


def in_units(adata: ad.AnnData, units: str) -> str | None:
    """The layer to train on: None is log-normalised counts."""
    if units == "lognorm":
        return None
    adata.layers["log_counts"] = adata.X.log1p() if sparse.issparse(adata.X) else np.log1p(adata.X)
    return "log_counts"


def predictor(
    method: str, train: ad.AnnData, data: Data, layer: str | None, seed: int, quick: dict[str, Any]
) -> Callable[[ad.AnnData, int], Any]:
    """Train a method; what is returned writes its prediction, with draws if it has any, under the method's name."""
    shared: dict[str, Any] = {"use_rep": data.use_rep, "library_key": data.library_key}
    if method in BASELINES:
        name, standardize = BASELINES[method]
        random_state = seed if METHODS[name].is_random else None
        fitted = hv.tl.baseline(train, name, layer=layer, standardize=standardize, random_state=random_state, **shared)
        return lambda query, draws: fitted.predict(query, key_added=method)
    config, decoding, n_genes = None, "expected", int(train.var["histovar_panel"].sum())
    if method == "reference, cut":
        shared["use_rep"] = data.use_rep[:1]
        usual = hv.ModelConfig.default(n_genes)
        config = hv.ModelConfig.reference(
            n_genes=n_genes,
            scales=usual.scales,
            components=(1,) * len(usual.scales),
            encoder_hidden=usual.encoder_hidden,
            **REFERENCE_CUT,
        )
    elif method != OURS:
        ablation = ABLATIONS[method]
        config, decoding = hv.ModelConfig.default(n_genes, **ablation.config), ablation.decoding
        if ablation.shuffle_genes:
            hv.pp.gene_scales(train)
            panel = train.var["histovar_panel"].to_numpy()
            groups = train.varm["histovar_scales"].copy()
            finest = groups[panel, -1].copy()
            groups[panel] = np.random.default_rng(0).permutation(groups[panel])
            groups[panel, -1] = finest
            train.varm["histovar_scales"] = groups
    options = {"random_state": seed, "enable_progress_bar": False, **quick}
    model = hv.tl.train(train, layer=layer, config=config, **shared, **options)
    return lambda query, draws: hv.tl.predict(query, model, n_samples=draws, decoding=decoding, key_added=method)


def run(
    method: str, train: ad.AnnData, query: ad.AnnData, data: Data, layer: str | None, seed: int, quick: Any, draws: int
) -> pd.Series:
    """Scores, times and memory of one method on one split."""
    begin = time.monotonic()
    write = predictor(method, train.copy(), data, layer, seed, quick)
    trained = time.monotonic()
    write(query, 0)
    predicted = time.monotonic()
    if draws and method == OURS:
        write(query, draws)
    hv.tl.evaluate(query, key=method)
    scores = query.uns[method]["evaluation"].loc["mean"].copy()
    scores["training, s"], scores["prediction, s"] = trained - begin, predicted - trained
    scores["threads"] = torch.get_num_threads()
    scores["GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return scores


def dense(adata: ad.AnnData) -> np.ndarray:
    """Its counts."""
    return adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X)


def bounds(train: ad.AnnData, query: ad.AnnData, genes: list[str], data: Data, units: str) -> pd.DataFrame:
    """What other methods are held against: rows of scores.

    The noise ceiling of the counts; the oracle that knows every spot's total count and nothing else; the co-expression
    measured in the training sections, as a prediction of that in the held-out ones; and how far the true co-expression
    would be from that measured in so many spots, which is half of the difference between random halves of them.
    """
    names = ("noise ceiling", "depth oracle", TRAINING, NOISE)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    columns = query.var_names.get_indexer(genes)

    def in_units(counts: np.ndarray) -> np.ndarray:
        total = counts.sum(1).clip(1)[:, None]
        return np.log1p(counts if units == "log_counts" else counts / total * 1e4)[:, columns]

    known = in_units(dense(train))
    for section in query.obs[data.library_key].unique():
        counts = dense(query[query.obs[data.library_key] == section])
        total = counts.sum(1)
        values = in_units(counts)
        rows[TRAINING].append({"correlation error": hv.metrics.gene_correlation_error(known, values)})
        halves = np.array_split(np.random.default_rng(0).permutation(values), 2)
        n = min(len(half) for half in halves)
        apart = hv.metrics.gene_correlation_error(halves[0][:n], halves[1][:n])
        rows[NOISE].append({"correlation error": apart / 2})
        ceiling = hv.metrics.noise_ceiling(counts, columns, log_counts=units == "log_counts")
        ceiling = np.sort(ceiling[~np.isnan(ceiling)])[::-1]
        best = {f"PCC-{n}": ceiling[:n].mean() if n <= len(ceiling) else np.nan for n in (10, 50, 200)}
        rows["noise ceiling"].append(best)
        depth = np.log1p(total)
        design = np.stack([np.ones_like(depth), depth, depth**2], 1)
        fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
        rows["depth oracle"].append(hv.metrics.summary(hv.metrics.per_gene(fitted, values, genes)))
    return pd.DataFrame({name: pd.DataFrame(found).mean() for name, found in rows.items()}).T


def compare(data: Data, methods: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All methods on all splits: one row for each method, held-out group and seed."""
    quick: dict[str, Any] = {"max_epochs": 1} if arguments.smoke else {}
    for group, train, query in splits(data, arguments.folds):
        layer = in_units(train, arguments.units)
        in_units(query, arguments.units)
        hv.pp.gene_panel(train, n_genes=200, min_fraction=data.min_fraction)
        genes = train.var_names[train.var["histovar_panel"]].tolist()
        for name, scores in bounds(train, query, genes, data, arguments.units).iterrows():
            yield {"method": name, "held out": group, "seed": 0, **scores}
        for method in methods:
            for seed in range(arguments.seeds if method in RANDOM | {OURS} else 1):
                draws = arguments.draws if seed == 0 else 0
                scores = run(method, train, query, data, layer, seed, quick, draws)
                yield {"method": method, "held out": group, "seed": seed, **scores}
                print(f"{group} {method} {seed}: PCC-200 {scores.get('PCC-200', scores['PCC-all']):.4f}", flush=True)


def subsample(train: ad.AnnData, n_spots: int, data: Data) -> ad.AnnData:
    """As many spots of every section, with the neighbourhoods that they have among themselves."""
    rng = np.random.default_rng(0)
    order = pd.Series(rng.permutation(train.n_obs), index=train.obs_names)
    rank = order.groupby(train.obs[data.library_key].astype(str)).rank()
    return train[np.lexsort((order, rank))[:n_spots]].copy()


def learning_curve(data: Data, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Scores over the number of training spots, one row for each method, held-out group and number."""
    quick: dict[str, Any] = {"max_epochs": 1} if arguments.smoke else {}
    for group, train, query in splits(data, arguments.folds):
        layer = in_units(train, arguments.units)
        in_units(query, arguments.units)
        hv.pp.gene_panel(train, n_genes=200, min_fraction=data.min_fraction)
        sizes = [n for n in arguments.sizes if n < train.n_obs] + [train.n_obs]
        for n_spots in sizes:
            some = subsample(train, n_spots, data)
            for method in arguments.methods or ["ridge, tuned", "MLP", OURS]:
                scores = run(method, some, query, data, layer, 0, quick, 0)
                yield {"method": method, "held out": group, "seed": 0, "spots": n_spots, **scores}
                print(f"{group} {n_spots} {method}: PCC-200 {scores.get('PCC-200', scores['PCC-all']):.4f}", flush=True)


def shallow(data: Data, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A stand-in for another patient: counts of the held-out group thinned, its embeddings shifted.

    Every method is trained on log-normalised and on raw log counts, and each is scored against both.
    """
    for group, train, query in splits(data, arguments.folds):
        rng = np.random.default_rng(0)
        counts = dense(query)
        share = min(1.0, arguments.depth / np.median(counts.sum(1)))
        counts = rng.binomial(counts.astype(int), share).astype(np.float32)
        query.X = sparse.csr_matrix(counts)
        for key in data.use_rep:
            values = np.asarray(query.obsm[key])
            query.obsm[key] = values + (rng.normal(size=values.shape[1]) * values.std(0)).astype(values.dtype)
        hv.pp.gene_panel(train, n_genes=200, min_fraction=data.min_fraction)
        columns = query.var_names.get_indexer(train.var_names[train.var["histovar_panel"]])
        total = counts.sum(1)
        truths = {
            "lognorm": np.log1p(counts / total.clip(1)[:, None] * 1e4)[:, columns],
            "log counts": np.log1p(counts)[:, columns],
        }
        for units in ("lognorm", "log_counts"):
            layer = in_units(train, units)
            for method in arguments.methods or ["ridge, tuned", "ridge, tuned, per section", "MLP", OURS]:
                predictor(method, train.copy(), data, layer, 0, {})(query, 0)
                predicted = np.asarray(hv.get.prediction(query, key=method).X)
                row: dict[str, Any] = {
                    "method": f"{method}, of {units.replace('_', ' ')}",
                    "held out": group,
                    "seed": 0,
                }
                for name, truth in truths.items():
                    row[f"PCC-200 {name}"] = hv.metrics.mean_pearson(predicted, truth)
                    row[f"PCC-partial {name}"] = np.nanmean(hv.metrics.partial_pearson(predicted, truth, total))
                yield row


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over held-out groups and seeds of every method, and the spread of its main score over each."""
    keys = ["method", "spots"] if "spots" in rows else ["method"]
    scores = [c for c in rows if c not in (*keys, "held out", "seed")]
    kept = [c for c in COLUMNS if c in scores] if "MSE" in scores else scores
    means = rows.groupby(keys, sort=False)[kept].mean()
    main = next(c for c in ("PCC-200", "PCC-200 lognorm", "PCC-all") if c in scores)
    groups = rows.groupby([*keys, "held out"], sort=False)[main].mean().groupby(keys, sort=False)
    seeds = rows.groupby([*keys, "seed"], sort=False)[main].mean().groupby(keys, sort=False)
    means.insert(0, f"{main} by held-out", groups.apply(lambda s: " ".join(f"{v:.3f}" for v in s)))
    means.insert(1, "sd over held-out", groups.std())
    means.insert(2, "sd over seeds", seeds.std())
    return means


def plot(rows: pd.DataFrame, path: Path) -> None:
    """PCC-200 and depth-partial PCC of every method, or over the number of training spots."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharey="spots" not in rows)
    for axis, score in zip(axes, ("PCC-200", "PCC-partial"), strict=True):
        if "spots" in rows:
            for method, part in rows.groupby("method", sort=False):
                means = part.groupby("spots")[score].mean()
                axis.plot(means.index, means, "o-", label=method)
            sizes = sorted(rows["spots"].unique())
            axis.set(xscale="log", xlabel="training spots", ylabel=score)
            axis.set_xticks(sizes, labels=[f"{n:.0f}" for n in sizes], rotation=45)
            axis.minorticks_off()
            axis.legend()
        else:
            part = rows.groupby(["method", "held out"], sort=False)[score].mean().unstack()
            part = part.loc[part.mean(1).sort_values().index].dropna(how="all")
            axis.barh(part.index, part.mean(1), color=["C1" if m == OURS else "C0" for m in part.index])
            for group in part:
                axis.plot(part[group], part.index, ".", color="black", alpha=0.5)
            axis.set(xlabel=f"{score}, mean and each held-out group")
            axis.locator_params(axis="x", nbins=6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="her2st, mob, simulated or an h5ad file")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HISTOVAR_DATA", "../shared/data")))
    parser.add_argument("--use-rep", nargs="+", help="obsm keys of an h5ad file")
    parser.add_argument("--library-key", default="section")
    parser.add_argument("--group-key", help="obs column of what is left out; the section by default")
    parser.add_argument("--units", choices=["lognorm", "log_counts"], default="lognorm")
    parser.add_argument("--methods", nargs="+", help="some methods alone")
    parser.add_argument("--update", action="store_true", help="keep what --out has of methods that are not run now")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 200, 400])
    parser.add_argument("--shallow", action="store_true")
    parser.add_argument("--depth", type=int, default=650, help="median counts to thin to")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, help="only so many groups left out")
    parser.add_argument("--draws", type=int, default=20, help="joint draws of histovar to score, in the first seed")
    parser.add_argument("--out", type=Path, default=Path("compare_output"))
    parser.add_argument("--smoke", action="store_true", help="one fold, one epoch, one seed")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))
    if arguments.smoke:
        arguments.folds, arguments.seeds, arguments.draws, arguments.sizes = 1, 1, 2, [100]
    named = {"her2st": "her2st/paired.h5ad", "mob": "mob.h5ad"}
    if arguments.dataset in named and not (arguments.data / named[arguments.dataset]).is_file():
        print(f"no {arguments.dataset} in {arguments.data}: nothing measured; set HISTOVAR_DATA or --data")
        return
    data = load(arguments.dataset, arguments)
    kind = (
        "shallow"
        if arguments.shallow
        else "curve"
        if arguments.curve
        else "ablations"
        if arguments.ablations
        else "table"
    )
    print(
        f"{data.name}: leave one {data.group_key} of {data.adata.obs[data.group_key].nunique()} out, {arguments.units}"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "_".join([data.name, kind] + (["log_counts"] if arguments.units == "log_counts" else []))
    methods = arguments.methods or ([OURS, *ABLATIONS] if arguments.ablations else [OURS, *BASELINES, "reference, cut"])
    found = (
        shallow(data, arguments)
        if arguments.shallow
        else learning_curve(data, arguments)
        if arguments.curve
        else compare(data, methods, arguments)
    )
    path = arguments.out / f"{name}.csv"
    before = pd.read_csv(path) if arguments.update and path.is_file() else pd.DataFrame({"method": []})
    rows = pd.DataFrame()
    for row in found:
        rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True)
        kept = before[~before["method"].isin(rows["method"])]
        pd.concat([rows, kept], ignore_index=True).to_csv(path, index=False)
    rows = pd.read_csv(path)
    print(table(rows).to_string(float_format=lambda v: f"{v:.3f}"))
    if "PCC-200" in rows and "PCC-partial" in rows:
        plot(rows, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
