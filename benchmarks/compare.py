"""Compare histovar with other methods on the same splits, gene panel and embeddings.

    python benchmarks/compare.py her2st                    # leave one section out
    python benchmarks/compare.py mob                       # leave one mouse out
    python benchmarks/compare.py her2st_dinov2             # with embeddings of DINOv2; also mob_dinov2
    python benchmarks/compare.py her2st --ablations        # histovar without one part at a time
    python benchmarks/compare.py her2st --units lognorm log_counts  # also scored on log1p of the counts
    python benchmarks/compare.py her2st --curve            # learning curve over the number of training spots
    python benchmarks/compare.py simulated --curve         # up to 20,000 simulated spots
    python benchmarks/compare.py her2st --pairs            # train on every pair of sections, predict the others
    python benchmarks/compare.py her2st --shallow          # held-out section thinned to 650 counts, embeddings shifted
    python benchmarks/compare.py my.h5ad --use-rep X_uni --library-key section --group-key patient
    python benchmarks/compare.py her2st --methods MLP --update  # replace some methods' rows in earlier results
    python benchmarks/compare.py simulated --smoke         # a few minutes, to see that it runs

A table is printed; ``--out`` gets a CSV file of every score and a plot. The environment variable HISTOVAR_DATA names
the directory with her2st and mob. histovar learns from counts and is trained once for all ``--units``; other methods
are trained on a layer in each of them. Peak memory is that of the process up to then, so it depends on the order of the
methods.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from real_data import HER2ST, MOB, data_path
from scipy import sparse
from smoke import quick_options

import histovar as hv
from histovar.baselines import METHODS

N_GENES = 200
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
# Baselines that are run with several seeds.
RANDOM = {"MLP"}
TRAINING = "training sections, measured"
NOISE = "sampling noise of held-out spots"
OURS, REFERENCE, WHOLE_REFERENCE = "histovar", "reference, cut", "reference"
# The reference with one layer, a narrower feed-forward, fewer codes and in scale order, which two CPU cores can train.
REFERENCE_CUT = {
    "width": 640,
    "n_layers": 1,
    "feedforward": 256,
    "codebook_size": 256,
    "dropout": 0.1,
    "order": "scale",
}
UNITS = ["lognorm", "log_counts"]
# Registered scores that the table leaves out for want of room.
LEFT_OUT = re.compile("PCC-all|n_|coverage (50|80|95)|width|PIT|uncertainty")
SCORES = [name for name in hv.metrics.describe().index if not LEFT_OUT.match(name)]
COLUMNS = [*SCORES, "training, s", "prediction, s", "GB"]


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
class Named:
    """File, embeddings and split of a data set known by name, and how many spots must detect a gene of the panel."""

    file: str
    use_rep: list[str]
    group_key: str
    min_fraction: float


NAMED = {
    "her2st": Named(HER2ST, ["X_squeezenet", "X_squeezenet_wide"], "section", 0.1),
    "her2st_dinov2": Named(HER2ST, ["X_dinov2", "X_dinov2_wide"], "section", 0.1),
    "mob": Named(MOB, ["X_densenet121_112um", "X_densenet121_224um"], "animal", 0.2),
    "mob_dinov2": Named(MOB, ["X_dinov2_224um"], "animal", 0.2),
}


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


METHODS_OF = {
    "table": [OURS, *BASELINES, REFERENCE],
    "ablations": [OURS, *ABLATIONS],
    "curve": ["ridge, tuned", "MLP", OURS],
    "pairs": ["ridge, tuned", "ridge, tuned, per section", "PLS", "MLP", "MLP, per section", OURS],
    "shallow": ["ridge, tuned", "ridge, tuned, per section", "MLP", OURS],
}


def load(name: str, arguments: argparse.Namespace) -> Data:
    """Load a data set by its name or file."""
    if name == "simulated":
        n_spots = 150 if arguments.smoke else 5000 if arguments.curve else 400
        adata = hv.datasets.simulate(n_sections=5 if arguments.curve else 4, n_spots=n_spots, random_state=0)
        return Data(name, adata, ["X_histology"], "section", "section", 0.05)
    if name in NAMED:
        known = NAMED[name]
        adata = ad.read_h5ad(data_path(known.file))
        group_key = arguments.group_key or known.group_key
        return Data(name, adata, known.use_rep, "section", group_key, known.min_fraction)
    if not arguments.use_rep:
        raise SystemExit("--use-rep: say which obsm keys of the file hold embeddings")
    adata = ad.read_h5ad(name)
    return Data(
        Path(name).stem, adata, arguments.use_rep, arguments.library_key, arguments.group_key or arguments.library_key
    )


def splits(data: Data, n_folds: int | None, pairs: bool) -> Iterator[tuple[str, ad.AnnData, ad.AnnData]]:
    """Leave out each group, or all but each pair of sections: name of what is held out, training and held-out spots."""
    groups = data.adata.obs[data.library_key if pairs else data.group_key].astype(str)
    names = sorted(groups.unique())
    for held_out in list(combinations(names, len(names) - 2) if pairs else zip(names))[:n_folds]:
        rows = groups.isin(held_out).to_numpy()
        yield " and ".join(held_out), data.adata[~rows].copy(), data.adata[rows].copy()


def thin(query: ad.AnnData, data: Data, depth: int) -> ad.AnnData:
    """Imitate another patient: thin counts to a median of `depth` a spot and shift the embeddings."""
    rng = np.random.default_rng(0)
    counts = dense(query)
    share = min(1.0, depth / np.median(counts.sum(1)))
    query.X = sparse.csr_matrix(rng.binomial(counts.astype(int), share).astype(np.float32))
    query.layers.pop("lognorm", None)
    for key in data.use_rep:
        values = np.asarray(query.obsm[key])
        query.obsm[key] = values + (rng.normal(size=values.shape[1]) * values.std(0)).astype(values.dtype)
    return query


def layer_of(adata: ad.AnnData, units: str) -> str | None:
    """Name of the layer in these units, which is added if need be; None stands for log-normalised counts."""
    if units == "lognorm":
        return None
    adata.layers["log_counts"] = adata.X.log1p() if sparse.issparse(adata.X) else np.log1p(adata.X)
    return "log_counts"


def configuration(method: str, train: ad.AnnData) -> tuple[hv.ModelConfig | None, str]:
    """Configuration (None: the default) and decoding of a method; one ablation also shuffles the gene groups."""
    if method == OURS:
        return None, "expected"
    n_genes = int(train.var["histovar_panel"].sum())
    if method == WHOLE_REFERENCE:
        return hv.ModelConfig.reference(n_genes=n_genes), "expected"
    if method == REFERENCE:
        usual = hv.ModelConfig.default(n_genes)
        config = hv.ModelConfig.reference(
            n_genes=n_genes,
            scales=usual.scales,
            components=(1,) * len(usual.scales),
            encoder_hidden=usual.encoder_hidden,
            **REFERENCE_CUT,
        )
        return config, "expected"
    ablation = ABLATIONS[method]
    if ablation.shuffle_genes:
        hv.pp.gene_scales(train)
        panel = train.var["histovar_panel"].to_numpy()
        groups = train.varm["histovar_scales"].copy()
        finest = groups[panel, -1].copy()
        groups[panel] = np.random.default_rng(0).permutation(groups[panel])
        groups[panel, -1] = finest
        train.varm["histovar_scales"] = groups
    return hv.ModelConfig.default(n_genes, **ablation.config), ablation.decoding


def predict_baseline(fitted: Any, method: str, units: str, query: ad.AnnData, draws: int) -> None:
    """Predict; joint draws are from the normal distribution by which baselines are scored, with independent genes."""
    layer_of(query, units)
    fitted.predict(query, key_added=method)
    if draws:
        predicted = hv.get.prediction(query, key=method)
        mean, std = np.asarray(predicted.X), np.asarray(predicted.layers["std"])
        noise = np.random.default_rng(0).standard_normal((*mean.shape, draws))
        query.obsm[f"{method}_samples"] = (mean[..., None] + std[..., None] * noise).clip(0).astype(np.float32)


def predictors(
    method: str, train: ad.AnnData, data: Data, units: list[str], seed: int, quick: dict[str, Any]
) -> Iterator[tuple[str, Callable[[ad.AnnData, int], Any], float]]:
    """Train a method; for each of the units yield a function that writes its prediction, and the seconds of training.

    histovar learns from counts, and is trained once for all units. Baselines, and ablations that predict a layer, are
    trained once for each.
    """
    shared: dict[str, Any] = {"use_rep": data.use_rep, "library_key": data.library_key}
    if data.group_key != data.library_key:
        shared["group_key"] = data.group_key
    begin = time.monotonic()
    if method in BASELINES:
        name, standardize = BASELINES[method]
        options: dict[str, Any] = {
            "standardize": standardize,
            "random_state": seed if METHODS[name].is_random else None,
        }
        for unit in units:
            begin = time.monotonic()
            fitted = hv.tl.baseline(train, name, layer=layer_of(train, unit), **shared, **options)
            yield unit, partial(predict_baseline, fitted, method, unit), time.monotonic() - begin
        return
    config, decoding = configuration(method, train)
    if method in (REFERENCE, WHOLE_REFERENCE):
        shared["use_rep"] = data.use_rep[:1]
    of_counts = decoding == "expected" and (config is None or config.n_members > 0)
    options = {"random_state": seed, "enable_progress_bar": False, **quick}
    if config is not None:
        options["config"] = config

    def write(model: hv.TwoStageVARST, unit: str | None, query: ad.AnnData, draws: int) -> None:
        hv.tl.predict(query, model, units=unit, n_samples=draws, decoding=decoding, key_added=method)

    if of_counts:
        model = hv.tl.train(train, **shared, **options)
        seconds = time.monotonic() - begin
        for unit in units:
            yield unit, partial(write, model, unit), seconds
        return
    for unit in units:
        begin = time.monotonic()
        model = hv.tl.train(train, layer=layer_of(train, unit), **shared, **options)
        yield unit, partial(write, model, None), time.monotonic() - begin


def score(method: str, query: ad.AnnData, write: Callable[[ad.AnnData, int], Any], draws: int) -> pd.Series:
    """Scores of one prediction, the seconds that it took, and the process's peak memory."""
    query = query.copy()
    begin = time.monotonic()
    write(query, 0)
    predicted = time.monotonic()
    hv.tl.evaluate(query, key=method)
    scores = query.uns[method]["evaluation"].loc["mean"].copy()
    if draws:
        write(query, draws)
        hv.tl.evaluate(query, key=method)
        of_draws = query.uns[method]["evaluation"].loc["mean"].filter(like=" of draws")
        scores = pd.concat([scores, of_draws])
    scores["prediction, s"] = predicted - begin
    scores["threads"] = torch.get_num_threads()
    scores["GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return scores


def run(
    method: str, train: ad.AnnData, query: ad.AnnData, data: Data, units: list[str], seed: int, quick: Any, draws: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train one method on one split, and score it in each of the units."""
    for unit, write, seconds in predictors(method, train.copy(), data, units, seed, quick):
        scores = score(method, query, write, draws)
        yield unit, {**scores, "training, s": seconds}
        print(f"{method}, seed {seed}, {unit}: PCC-200 {scores.get('PCC-200', scores['PCC-all']):.4f}", flush=True)


def dense(adata: ad.AnnData) -> np.ndarray:
    """Counts as a dense array."""
    return adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X)


def coexpression_agreement(known: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Agreement of the co-expression in some spots with that measured in others."""
    varies = ~hv.metrics.is_constant(measured)
    pairs = np.triu_indices(varies.sum(), 1)
    k, m = (hv.metrics.gene_correlation(values[:, varies])[pairs] for values in (known, measured))
    return {
        "correlation error": np.sqrt(((k - m) ** 2).mean()),
        "gene-structure correlation": np.corrcoef(k, m)[0, 1],
    }


def bounds(train: ad.AnnData, query: ad.AnnData, genes: list[str], data: Data, units: str) -> pd.DataFrame:
    """Scores that no method competes with, one row for each.

    - The noise ceiling of the counts.
    - The depth oracle, which knows every spot's total count and nothing else.
    - The co-expression measured in the training sections, as a prediction of that in the held-out ones.
    - Sampling noise: how far the true co-expression would be from that measured in so many spots, estimated as half of
      the difference between random halves of them.
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
        rows[TRAINING].append(coexpression_agreement(known, values))
        halves = np.array_split(np.random.default_rng(0).permutation(values), 2)
        rows[NOISE].append({"correlation error": coexpression_agreement(*halves)["correlation error"] / 2})
        ceiling = hv.metrics.noise_ceiling(counts, columns, log_counts=units == "log_counts")
        ceiling = np.sort(ceiling[~np.isnan(ceiling)])[::-1]
        best = {f"PCC-{n}": ceiling[:n].mean() if n <= len(ceiling) else np.nan for n in (10, 50, 200)}
        rows["noise ceiling"].append(best)
        depth = np.log1p(total)
        design = np.stack([np.ones_like(depth), depth, depth**2], 1)
        fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
        rows["depth oracle"].append(hv.metrics.summary(hv.metrics.per_gene(fitted, values, genes)))
    return pd.DataFrame({name: pd.DataFrame(found).mean() for name, found in rows.items()}).T


def folds(data: Data, arguments: argparse.Namespace) -> Iterator[tuple[str, ad.AnnData, ad.AnnData]]:
    """Every split, with the panel chosen on the training spots; with ``--shallow``, held-out spots are thinned."""
    for group, train, query in splits(data, arguments.folds, arguments.pairs):
        hv.pp.gene_panel(train, n_genes=N_GENES, min_fraction=data.min_fraction)
        print(f"held out: {group}", flush=True)
        yield group, train, thin(query, data, arguments.depth) if arguments.shallow else query


def compare(data: Data, methods: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run all methods on all splits; yield the units and a row for each method, held-out group and seed."""
    quick = quick_options(N_GENES) if arguments.smoke else {}
    for group, train, query in folds(data, arguments):
        genes = train.var_names[train.var["histovar_panel"]].tolist()
        for unit in arguments.units:
            for name, scores in bounds(train, query, genes, data, unit).iterrows():
                yield unit, {"method": name, "held out": group, "seed": 0, **scores}
        for method in methods:
            for seed in range(arguments.seeds if method in RANDOM | {OURS} else 1):
                draws = arguments.draws if seed == 0 else 0
                for unit, scores in run(method, train, query, data, arguments.units, seed, quick, draws):
                    yield unit, {"method": method, "held out": group, "seed": seed, **scores}


def subsample(train: ad.AnnData, n_spots: int, data: Data) -> ad.AnnData:
    """Draw training spots, equally many from every section; neighbourhoods are then those among the spots drawn."""
    rng = np.random.default_rng(0)
    order = pd.Series(rng.permutation(train.n_obs), index=train.obs_names)
    rank = order.groupby(train.obs[data.library_key].astype(str)).rank()
    return train[np.lexsort((order, rank))[:n_spots]].copy()


def learning_curve(
    data: Data, methods: list[str], arguments: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the units and a row of scores for each method, held-out group and number of training spots."""
    quick = quick_options(N_GENES) if arguments.smoke else {}
    for group, train, query in folds(data, arguments):
        for n_spots in [n for n in arguments.sizes if n < train.n_obs] + [train.n_obs]:
            subset = subsample(train, n_spots, data)
            for method in methods:
                for unit, scores in run(method, subset, query, data, arguments.units, 0, quick, 0):
                    yield unit, {"method": method, "held out": group, "seed": 0, "spots": n_spots, **scores}


def with_one_full_size(rows: pd.DataFrame) -> pd.DataFrame:
    """Give the largest size of a learning curve, which differs a little between folds, its mean over the folds."""
    if "spots" not in rows:
        return rows
    every = rows["spots"] == rows.groupby("held out")["spots"].transform("max")
    return rows.assign(spots=rows["spots"].mask(every, round(rows.loc[every, "spots"].mean())))


def interval(means: pd.Series) -> str:
    """95 % interval of the mean over held-out groups, by a bootstrap of them."""
    ends = hv.metrics.bootstrap_interval(means.to_frame("score"), [str(i) for i in range(len(means))])["score"]
    return "" if ends.isna().any() else f"{ends['low']:.3f} to {ends['high']:.3f}"


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method's means over held-out groups and seeds, and the spread of its main scores over both."""
    rows = with_one_full_size(rows)
    keys = ["method", "spots"] if "spots" in rows else ["method"]
    scores = [c for c in rows if c not in (*keys, "held out", "seed")]
    means = rows.groupby(keys, sort=False)[[c for c in COLUMNS if c in scores]].mean()
    main = next(c for c in ("PCC-200", "PCC-all") if c in scores)
    seeds = rows.groupby([*keys, "seed"], sort=False)[main].mean().groupby(keys, sort=False)
    for place, name in enumerate(c for c in (main, "coverage 90", "coverage 90 given depth") if c in scores):
        groups = rows.groupby([*keys, "held out"], sort=False)[name].mean().groupby(keys, sort=False)
        means.insert(place, f"{name} by held-out", groups.apply(lambda s: " ".join(f"{v:.3f}" for v in s)))
        if name == main:
            error_bars = groups.apply(interval)
    means.insert(1, "95 % interval", error_bars)
    means.insert(2, "sd over seeds", seeds.std())
    return means


def plot(rows: pd.DataFrame, path: Path) -> None:
    """Plot PCC-200 and PCC-partial of every method, or their learning curves."""
    rows = with_one_full_size(rows)
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
    parser.add_argument("dataset", help=f"{', '.join(NAMED)}, simulated or an h5ad file")
    parser.add_argument("--use-rep", nargs="+", help="obsm keys of an h5ad file")
    parser.add_argument("--library-key", default="section", help="obs column of the section, in an h5ad file")
    parser.add_argument("--group-key", help="obs column of what is left out; default the section, of mob the animal")
    parser.add_argument("--units", nargs="+", choices=UNITS, help="default lognorm; with --shallow both")
    parser.add_argument("--methods", nargs="+", help="run only these methods")
    parser.add_argument("--update", action="store_true", help="keep the rows that --out has of other methods")
    parser.add_argument("--ablations", action="store_true", help="histovar without one part at a time")
    parser.add_argument("--curve", action="store_true", help="learning curve over the number of training spots")
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 200, 400], help="of --curve")
    parser.add_argument("--pairs", action="store_true", help="train on every pair of sections")
    parser.add_argument("--shallow", action="store_true", help="thin held-out sections, shift their embeddings")
    parser.add_argument("--depth", type=int, default=650, help="median total count of --shallow")
    parser.add_argument("--seeds", type=int, default=3, help="of histovar and MLP")
    parser.add_argument("--folds", type=int, help="leave out only so many groups")
    parser.add_argument("--draws", type=int, default=20, help="joint draws of histovar to score, in the first seed")
    parser.add_argument("--out", type=Path, default=Path("compare_output"), help="directory for CSV files and plots")
    parser.add_argument("--smoke", action="store_true", help="one fold, one epoch, one seed")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))
    if arguments.smoke:
        arguments.folds, arguments.seeds, arguments.draws, arguments.sizes = 1, 1, 2, [100]
    data = load(arguments.dataset, arguments)
    arguments.units = arguments.units or (UNITS if arguments.shallow else UNITS[:1])
    kinds = {name: getattr(arguments, name) for name in ("shallow", "curve", "ablations", "pairs")}
    kind = next((name for name, asked in kinds.items() if asked), "table")
    methods = arguments.methods or METHODS_OF[kind]
    n_groups = data.adata.obs[data.group_key].nunique()
    print(f"{data.name}: leave one {data.group_key} of {n_groups} out, {', '.join(arguments.units)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = {unit: "_".join([data.name, kind, *([unit] if unit != "lognorm" else [])]) for unit in arguments.units}
    paths = {unit: arguments.out / f"{name}.csv" for unit, name in names.items()}
    nothing = pd.DataFrame({"method": []})
    before = {u: pd.read_csv(path) if arguments.update and path.is_file() else nothing for u, path in paths.items()}
    rows = dict.fromkeys(arguments.units, pd.DataFrame())
    for unit, row in (learning_curve if kind == "curve" else compare)(data, methods, arguments):
        rows[unit] = pd.concat([rows[unit], pd.DataFrame([row])], ignore_index=True)
        kept = before[unit][~before[unit]["method"].isin(rows[unit]["method"])]
        pd.concat([rows[unit], kept], ignore_index=True).to_csv(paths[unit], index=False)
    for unit, path in paths.items():
        of_unit = pd.read_csv(path)
        print(f"\n{unit}\n{table(of_unit).to_string(float_format=lambda v: f'{v:.3f}')}")
        if "PCC-200" in of_unit and "PCC-partial" in of_unit:
            plot(of_unit, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
