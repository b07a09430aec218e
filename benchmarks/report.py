"""Write the page "How good is it?" of the documentation from the results of compare.py.

    python benchmarks/compare.py her2st --out docs/_static/results     # likewise mob, --shallow, --curve, ...
    python benchmarks/report.py                                        # the page, with maps of the held-out mouse

Tables and bar charts come from the CSV files in ``--results``. The calibration plot and the maps are of one mouse of
the olfactory bulb set, predicted by a model that is trained here on the other; ``--no-figures`` leaves them as they
are. The environment variable HISTOVAR_DATA names the directory with the olfactory bulb set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import pandas as pd
from compare import NOISE, OURS, SCORES, TRAINING, interval, plot, with_one_full_size
from real_data import MOB, data_path

import histovar as hv

DIRECTIONS = hv.metrics.describe()["direction"]
MAIN = ["PCC-50", "PCC-200", "PCC-partial", "Spearman", "R2", "MSE", "CRPS", "coverage 90"]
COVERAGE = ["coverage 90", "coverage 90 top tenth"]
GIVEN_DEPTH = [name.removesuffix(" given depth") for name in SCORES if name.endswith(" given depth")]
# Scores of expected expression and of draws.
STRUCTURE = [name.removesuffix(" of draws") for name in SCORES if name.endswith(" of draws")]
ARROWS = {"higher is better": " ↑", "lower is better": " ↓"}
BOUNDS = ["noise ceiling", "depth oracle", TRAINING, NOISE]
DRAWS = ["RVD of draws", "correlation error of draws"]

HEAD = """# How good is it?

Every number on this page was measured by `benchmarks/compare.py`; `benchmarks/report.py` writes the page and draws the
maps. All methods get the same training spots, the same 200 most variable genes and the same embeddings.

- **PCC-200** is the Pearson correlation over the held-out spots, averaged over the 200 genes. **PCC-partial** is the
  same after the effect of sequencing depth (log total count, linear and squared) is removed from prediction and
  measurement. The page [Scores](metrics.md) defines every column. ↑: higher is better; ↓: lower is better.
- **Intervals** (95 %) are those of the mean over held-out sections or individuals, by a bootstrap of whole sections or
  individuals; with so few of them they are rather too narrow.
- The **noise ceiling** is the correlation that a perfect predictor could reach, estimated by binomial splitting of the
  counts. The **depth oracle** knows each spot's total count and nothing else.
- Methods **per section** standardise embeddings within sections; **HEST recipe** is the ridge regression of
  {cite:t}`jaume2024`.
- The noise ceiling and the depth oracle see the held-out counts; the methods do not.
- Settings were chosen on sections inside the training data. Training times are upper bounds, as runs shared the cores.
- *Expected expression* is a method's prediction; *draws* are samples of its predicted distribution: joint ones of
  histovar, independent ones for each gene of the other methods.
"""
TEXTS = {
    "her2st_table": (
        "## Another section of the same patient",
        "her2st {cite:p}`andersson2021`, sections C2 to C5 of one patient, 732 spots; each is left out in turn. "
        "MFBP and VAR_ST were reimplemented for this comparison from short descriptions; at this size VAR_ST learns "
        "next to nothing from so few spots, which says little about the original.",
    ),
    "her2st_table_log_counts": (
        "## Another section of the same patient, in raw log counts",
        "As above, scored on log1p of the counts themselves, where depth is part of what is predicted. histovar is the "
        "same model, as it learns from counts; other methods are trained again on log1p of the counts.",
    ),
    "her2st_dinov2_table": (
        "## Another section of the same patient, with DINOv2",
        "The same sections with embeddings of DINOv2 ViT-S/14 {cite:p}`oquab2023` (patch tokens after blocks 5 and 8), "
        "of the spot and of a wider field.",
    ),
    "her2st_dinov2_table_log_counts": (
        "## Another section of the same patient, in raw log counts, with DINOv2",
        "histovar is the same model; other methods are trained again on log1p of the counts.",
    ),
    "mob_table": (
        "## Another individual",
        "Mouse olfactory bulb {cite:p}`stahl2016`, four sections of two mice, 1,627 spots; each mouse is left out in "
        "turn.",
    ),
    "mob_table_log_counts": (
        "## Another individual, in raw log counts",
        "As above, scored on log1p of the counts. histovar is the same model; other methods are trained again.",
    ),
    "mob_dinov2_table": (
        "## Another individual, with DINOv2",
        "The same mice with embeddings of DINOv2 ViT-S/14 (patch tokens after blocks 5 and 8) of 224 um fields.",
    ),
    "mob_dinov2_table_log_counts": (
        "## Another individual, in raw log counts, with DINOv2",
        "histovar is the same model; other methods are trained again on log1p of the counts.",
    ),
    "her2st_shallow": (
        "## A shallow section with another stain",
        "An imitation of another patient: the held-out section's counts are thinned to a median of 650 a spot, and "
        "each column of its embeddings is shifted by a random amount with that column's standard deviation.",
    ),
    "her2st_shallow_log_counts": (
        "## A shallow section with another stain, in raw log counts",
        "As above. histovar is the same model; other methods are trained again on log1p of the counts.",
    ),
    "her2st_pairs": (
        "## Two training sections",
        "her2st: methods are trained on each pair of the four sections and scored on the other two.",
    ),
    "mob_pairs": (
        "## Two training sections, mouse olfactory bulb",
        "Methods are trained on each pair of the four sections, of one mouse or of both, and scored on the other two.",
    ),
    "her2st_curve": (
        "## Few training spots",
        "her2st, each section left out in turn. Training spots are drawn at random from the other sections, and "
        "neighbours are taken among the spots drawn.",
    ),
    "simulated_curve": (
        "## Many training spots",
        "Simulated sections (`hv.datasets.simulate`), one held out. Measured with an earlier version, which learnt "
        "log-normalised values rather than counts.",
    ),
    "her2st_ablations": (
        "## Ablations: what each part contributes",
        "histovar with one part left out or changed, on her2st with section C2 held out; and the reference "
        "configuration cut to what two CPU cores can train (one layer, 256 codes, scale order). With one seed, so "
        "compare differences with those between seeds, above. Measured with an earlier version, which learnt "
        "log-normalised values rather than counts.",
    ),
}


def markdown(table: pd.DataFrame) -> str:
    """Format a table as Markdown, with three decimals."""
    lines = [" | ".join(["", *table.index.names, *table.columns, ""]).strip()]
    lines.append("|" + "---|" * (len(table.index.names) + table.shape[1]))
    for label, row in table.iterrows():
        labels = label if isinstance(label, tuple) else (label,)
        cells = ["" if pd.isna(v) else v if isinstance(v, str) else f"{v:.3f}" for v in row]
        lines.append(
            " | ".join(["", *(f"{x:g}" if isinstance(x, float) else str(x) for x in labels), *cells, ""]).strip()
        )
    return "\n".join(lines)


def heading(score: str) -> str:
    """A score's name with an arrow in the direction that is better."""
    return score + ARROWS.get(DIRECTIONS.get(score, ""), "")


def mean_and_draws(means: pd.DataFrame) -> pd.DataFrame:
    """Scores of variances, co-expression and patterns, of expected expression and of draws in one cell."""
    cells = {}
    for score in (s for s in STRUCTURE if s in means):
        of_draws = means.get(f"{score} of draws", pd.Series(float("nan"), means.index))
        pairs = zip(means[score], of_draws, strict=True)
        cells[heading(score)] = [" / ".join(f"{v:.3f}" for v in pair if pd.notna(v)) for pair in pairs]
    return pd.DataFrame(cells, index=means.index)


def section(name: str, rows: pd.DataFrame, figures: Path) -> str:
    """Write a part of the page: text, tables and figure of one file of results."""
    title, text = TEXTS[name]
    rows = with_one_full_size(rows)
    keys = ["spots", "method"] if "spots" in rows else ["method"]
    numbers = [c for c in rows if c not in (*keys, "held out", "seed")]
    main = "PCC-200" if "PCC-200" in numbers else numbers[0]
    means = rows.groupby(keys, sort=False)[numbers].mean()
    means = means.sort_index() if "spots" in rows else means.sort_values(main, ascending=False)
    groups = rows["held out"].unique()
    shown = means[[c for c in MAIN if c in numbers] or numbers].dropna(how="all").rename(columns=heading)
    if len(groups) > 1:
        by_group = rows.groupby([*keys, "held out"], sort=False)[main].mean().groupby(keys, sort=False)
        shown.insert(0, f"{main}, 95 %", by_group.apply(interval))
    parts = [title, text, markdown(shown)]
    if "spots" not in rows:
        structure = mean_and_draws(means.loc[means[[c for c in STRUCTURE if c in numbers]].notna().any(axis=1)])
        coverage = means[[c for c in COVERAGE if c in numbers]].dropna(how="any")
        if coverage.shape[1] == len(COVERAGE):
            parts += [
                "Coverage of 90 % intervals, of all spots and of a gene's tenth with the highest prediction:",
                markdown(coverage),
            ]
        given = [score for score in GIVEN_DEPTH if f"{score} given depth" in numbers]
        if given:
            both = {"as predicted": given, "given depth": [f"{score} given depth" for score in given]}
            table = pd.DataFrame({name: means.loc[OURS, names].to_numpy() for name, names in both.items()})
            table.index = pd.Index(map(heading, given), name="score of histovar")
            parts += ["histovar, as predicted and if each spot's total count is given:", markdown(table)]
        if structure.shape[1]:
            parts += [
                "Variances, co-expression and spatial patterns, of expected expression / of draws:",
                markdown(structure),
            ]
    if "spots" in rows and len(groups) > 1:
        fewest = rows[rows["spots"] == rows["spots"].min()]
        for score in (s for s in (main, "PCC-partial") if s in numbers):
            parts += [
                f"{score} by held-out group, with {fewest['spots'].iloc[0]:g} spots:",
                markdown(fewest.pivot_table(score, "method", "held out", sort=False)),
            ]
    if "spots" not in rows and len(groups) > 1:
        for score in (s for s in (main, "PCC-partial", "coverage 90", "coverage 90 given depth") if s in numbers):
            by_group = rows.groupby(["method", "held out"], sort=False)[score].mean().unstack()
            by_group = by_group.dropna(how="all").dropna(how="all", axis="columns")
            parts += [
                f"{score} by held-out group:",
                markdown(by_group.loc[[m for m in means.index if m in by_group.index]]),
            ]
            if OURS not in by_group.index or score not in (main, "PCC-partial"):
                continue
            rivals = by_group.drop(index=[OURS, *BOUNDS], errors="ignore")
            behind = [g for g in by_group if by_group.loc[OURS, g] < rivals[g].max()]
            if behind:
                best = ", ".join(f"{g} ({rivals[g].idxmax()}: {rivals[g].max():.3f})" for g in behind)
                parts.append(f"histovar does **not** have the highest score on {best}.")
            else:
                parts.append("histovar has the highest score of the methods in each group.")
    ours = rows[rows["method"] == OURS]
    if "spots" not in rows and ours["seed"].nunique() > 1:
        for method in (OURS, "MLP"):
            seeds = rows[rows["method"] == method].groupby("seed")[main].mean()
            parts.append(f"{main} of {method} by seed: {', '.join(f'{value:.4f}' for value in seeds)}.")
    if set(DRAWS) <= set(numbers) and ours[DRAWS].notna().any().all():
        draws = ours[DRAWS].mean()
        rivals = rows[~rows["method"].isin([OURS, *BOUNDS])]
        least = rivals.groupby("method")["correlation error"].mean()
        parts.append(
            f"Joint draws of histovar have a gene-gene correlation error of {draws.iloc[1]:.3f} and an RVD of "
            f"{draws.iloc[0]:.3f}. The smallest correlation error of another method's prediction is "
            f"{least.min():.3f} ({least.idxmin()})."
        )
        floor, noise = (rows.loc[rows["method"] == m, "correlation error"].mean() for m in (TRAINING, NOISE))
        if pd.notna(floor):
            parts.append(
                f"The co-expression measured in the training sections has an error of {floor:.3f} on the held-out ones."
            )
        if pd.notna(noise):
            parts.append(
                f"Even the true co-expression would have an error of about {noise:.3f}, as so few spots do not measure "
                "it better (half of the difference between random halves of the spots)."
            )
    seconds = rows.groupby("method")["training, s"].mean() if "training, s" in rows else None
    if seconds is not None and OURS in seconds and "spots" not in rows:
        threads = int(ours["threads"].max()) if "threads" in rows else 2
        cores = "one CPU core" if threads == 1 else f"{threads} CPU cores"
        parts.append(f"Training histovar took {seconds[OURS]:.0f} s a fold on {cores}.")
    if {"PCC-200", "PCC-partial"} <= set(numbers):
        plot(rows, figures / f"{name}.png")
        parts.append(f"![{title[3:]}](_static/{figures.name}/{name}.png)")
    return "\n\n".join(parts) + "\n"


def train_on_one_mouse() -> tuple[hv.TwoStageVARST, ad.AnnData]:
    """Train a model on one mouse; return it, and the sections of the other."""
    adata = ad.read_h5ad(data_path(MOB))
    held_out = adata.obs["animal"].astype(str) == sorted(adata.obs["animal"].astype(str).unique())[1]
    train, query = adata[~held_out].copy(), adata[held_out].copy()
    hv.pp.gene_panel(train, n_genes=200, min_fraction=0.2)
    reps = ["X_densenet121_112um", "X_densenet121_224um"]
    return hv.tl.train(train, use_rep=reps, library_key="section", enable_progress_bar=False), query


def draw_other_mouse(model: hv.TwoStageVARST, query: ad.AnnData, figures: Path) -> None:
    """Predict the other mouse, and draw its calibration and the maps of its two best genes."""
    hv.tl.predict(query, model, quantiles=[0.005 + 0.01 * i for i in range(100)])
    scores = hv.tl.evaluate(query)
    hv.pl.calibration(query, save=figures / "mob_calibration.png")
    best = query.var.loc[scores["pearson"].nlargest(2).index, "symbol"].tolist()
    section = query.obs["section"].astype(str).iloc[0]
    hv.pl.spatial(query, best, gene_symbols="symbol", section=section, save=figures / "mob_map.png")


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=Path("docs/_static/results"), help="directory of CSV files and figures"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/how_good.md"), help="file to write")
    parser.add_argument("--no-figures", action="store_true", help="do not draw calibration and maps")
    arguments = parser.parse_args()
    if not arguments.no_figures:
        draw_other_mouse(*train_on_one_mouse(), arguments.results)
    parts = [HEAD]
    for name in TEXTS:
        if (arguments.results / f"{name}.csv").is_file():
            parts.append(section(name, pd.read_csv(arguments.results / f"{name}.csv"), arguments.results))
    if (arguments.results / "mob_map.png").is_file():
        parts.append(
            "## Calibration and maps of another individual\n\nA model trained on one mouse and applied to the other, "
            "with the intervals that `tl.train` calibrated on the training sections.\n\n"
            "![Calibration](_static/results/mob_calibration.png)\n\n"
            "![Measured, predicted and standard deviation of the two best genes](_static/results/mob_map.png)\n"
        )
    arguments.page.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
