"""Registry of the scores of :func:`histovar.tl.evaluate`: meaning, formula, source, unit, best value.

The columns of its tables and their order, the page "Scores" of the documentation, the directions named in plots, and
the columns of the benchmarks' tables are generated from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import pandas as pd

from histovar._arguments import check_arguments

DRAWS, GIVEN_DEPTH = " of draws", " given depth"
# Predictions that are scored besides expected expression and its distribution, by the suffix of their columns.
VARIANTS = {
    DRAWS: "the mean over joint draws, where there are any",
    GIVEN_DEPTH: "the prediction given every spot's total count",
}


@dataclass(frozen=True)
class Metric:
    r"""A score of a section, or the mean over the genes for which it is defined.

    Parameters
    ----------
    name
        Column of ``uns[key]["evaluation"]``.
    meaning
        Description in one sentence.
    formula
        In LaTeX, with predicted :math:`\hat y_{ig}` and measured :math:`y_{ig}` of spot :math:`i` and gene :math:`g`.
    source
        Publication that defined it.
    unit
        Unit of its values; ``"expression"`` stands for the units of the prediction.
    best
        Value of a perfect prediction; None for counts of genes.
    gene_score
        Column of the table that ``tl.evaluate`` returns whose mean it is, if there is one.
    variants
        Suffixes in :data:`VARIANTS` that are scored, too, in columns with these suffixes.
    """

    name: str
    meaning: str
    formula: str
    source: str
    unit: str
    best: float | None
    gene_score: str = ""
    variants: tuple[str, ...] = ()

    @property
    def direction(self) -> str:
        """Say which values are better. A best value of 1 cannot be exceeded, and 0 is the smallest value."""
        if self.best is None:
            return ""
        return {1.0: "higher is better", 0.0: "lower is better"}.get(self.best, f"nearer to {self.best:g} is better")


def _best_genes(n: int, variants: tuple[str, ...] = ()) -> Metric:
    meaning = f"Pearson correlation over the spots, mean of the best {n} genes"
    formula = rf"\frac1{{{n}}} \sum_{{g \in \text{{best {n}}}}} \rho_g"
    return Metric(f"PCC-{n}", meaning, formula, "Zhu et al. 2025 (Stem)", "none", 1.0, variants=variants)


def _coverage(percent: int, gene_score: str = "") -> Metric:
    return Metric(
        f"coverage {percent}",
        f"share of spots whose measured value lies in the central {percent} % interval",
        rf"\frac1n \sum_i [\,q_{{{(100 - percent) / 2:g}\%}} \le y_{{ig}} \le q_{{{(100 + percent) / 2:g}\%}}\,]",
        "Gneiting et al. 2007",
        "share of spots",
        percent / 100,
        gene_score,
        (GIVEN_DEPTH,),
    )


def _width(percent: int) -> Metric:
    return Metric(
        f"width {percent}",
        f"width of the central {percent} % interval; of two intervals with the right coverage, the narrower is better",
        rf"\frac1n \sum_i (q_{{{(100 + percent) / 2:g}\%}} - q_{{{(100 - percent) / 2:g}\%}})",
        "Gneiting et al. 2007",
        "expression",
        0.0,
    )


METRICS = (
    _best_genes(10),
    _best_genes(50),
    _best_genes(200, (GIVEN_DEPTH,)),
    Metric(
        "PCC-all",
        "Pearson correlation over the spots",
        r"\rho_g = \operatorname{corr}_i(\hat y_{ig}, y_{ig})",
        "Pearson 1895",
        "none",
        1.0,
        "pearson",
        (GIVEN_DEPTH,),
    ),
    Metric(
        "PCC-partial",
        "partial Pearson correlation given sequencing depth, which is regressed out of prediction and measurement",
        r"\operatorname{corr}_i(\hat y_{ig}, y_{ig} \mid \log(1 + N_i), \log^2(1 + N_i))",
        "Fisher 1924",
        "none",
        1.0,
        "partial_pearson",
        (GIVEN_DEPTH,),
    ),
    Metric(
        "Spearman",
        "Pearson correlation of the ranks",
        r"\operatorname{corr}_i(\operatorname{rank} \hat y_{ig}, \operatorname{rank} y_{ig})",
        "Spearman 1904",
        "none",
        1.0,
        "spearman",
    ),
    Metric(
        "R2",
        "coefficient of determination: share of the measured variance that the prediction explains; negative if it is "
        "worse than the gene's mean",
        r"1 - \sum_i (\hat y_{ig} - y_{ig})^2 / \sum_i (y_{ig} - \bar y_g)^2",
        "Wright 1921",
        "none",
        1.0,
        "r2",
        (GIVEN_DEPTH,),
    ),
    Metric(
        "MSE",
        "mean squared error",
        r"\frac1n \sum_i (\hat y_{ig} - y_{ig})^2",
        "Gauss 1823",
        "squared expression",
        0.0,
        "mse",
        (GIVEN_DEPTH,),
    ),
    Metric(
        "MAE",
        "mean absolute error",
        r"\frac1n \sum_i \lvert \hat y_{ig} - y_{ig} \rvert",
        "Laplace 1774",
        "expression",
        0.0,
        "mae",
    ),
    Metric("n_genes", "number of genes", "", "", "genes", None),
    Metric(
        "n_constant",
        "number of genes whose prediction is constant: their correlations count as 0",
        "",
        "",
        "genes",
        0.0,
        "constant",
    ),
    Metric(
        "n_undefined",
        "number of genes whose correlation is undefined, mostly because they are measured as constant; left out of "
        "means",
        "",
        "",
        "genes",
        None,
    ),
    Metric(
        "RVD",
        "relative variance distance: relative squared difference of predicted and measured variances over the spots",
        r"\frac1G \sum_g ((\operatorname{var} \hat y_g - \operatorname{var} y_g) / \operatorname{var} y_g)^2",
        "Zhu et al. 2025 (Stem)",
        "none",
        0.0,
        variants=(DRAWS,),
    ),
    Metric(
        "correlation error",
        "root mean square difference of predicted and measured gene-gene correlations",
        r"\sqrt{\operatorname{mean}_{g<h} (\hat r_{gh} - r_{gh})^2}",
        "Jöreskog & Sörbom 1981 (root mean square residual)",
        "none",
        0.0,
        variants=(DRAWS,),
    ),
    Metric(
        "gene-structure correlation",
        "correlation of predicted with measured gene-gene correlations: whether the same genes are co-expressed",
        r"\operatorname{corr}_{g<h}(\hat r_{gh}, r_{gh})",
        "Mantel 1967",
        "none",
        1.0,
        variants=(DRAWS,),
    ),
    Metric(
        "Moran correlation",
        "correlation over the genes of predicted and measured Moran's I: whether the same genes form patterns",
        r"\operatorname{corr}_g(I(\hat y_g), I(y_g)),\ "
        r"I(x) = \frac{n}{\sum_{ij} w_{ij}} \frac{\sum_{ij} w_{ij} z_i z_j}{\sum_i z_i^2},\ z = x - \bar x",
        "Moran 1950",
        "none",
        1.0,
        variants=(DRAWS,),
    ),
    Metric(
        "Moran error",
        "mean absolute difference of predicted and measured Moran's I: whether patterns are equally smooth",
        r"\frac1G \sum_g \lvert I(\hat y_g) - I(y_g) \rvert",
        "Moran 1950",
        "none",
        0.0,
        variants=(DRAWS,),
    ),
    Metric(
        "CRPS",
        "continuous ranked probability score of the predicted distribution: generalises the absolute error",
        r"\frac1n \sum_i \int (F_{ig}(x) - [\,x \ge y_{ig}\,])^2\, dx",
        "Gneiting & Raftery 2007",
        "expression",
        0.0,
        "crps",
        (GIVEN_DEPTH,),
    ),
    _coverage(50),
    _width(50),
    _coverage(80),
    _width(80),
    _coverage(90, "coverage"),
    _width(90),
    replace(
        _coverage(90, "coverage_top_tenth"),
        name="coverage 90 top tenth",
        meaning="coverage of the central 90 % interval among the tenth of a gene's spots with the highest prediction",
        formula=r"\operatorname{mean}_{i:\, \hat y_{ig} \ge Q_{90\%}(\hat y_g)} [\,q_{5\%} \le y_{ig} \le q_{95\%}\,]",
        source="Jin & Ren 2024 (selection-conditional coverage)",
    ),
    _coverage(95),
    _width(95),
    Metric(
        "PIT deviation",
        "mean distance from uniform of the probability integral transform: levels at which measured values lie",
        r"\operatorname{mean}_i \lvert u_{(i)g} - (i - \tfrac12) / n \rvert,\ u_{ig} = F_{ig}(y_{ig})",
        "Dawid 1984; randomised as Czado et al. 2009",
        "none",
        0.0,
        variants=(GIVEN_DEPTH,),
    ),
    Metric(
        "uncertainty PCC",
        "Pearson correlation over the spots of standard deviation and absolute error",
        r"\operatorname{corr}_i(\sigma_{ig}, \lvert \hat y_{ig} - y_{ig} \rvert)",
        "Pearson 1895",
        "none",
        1.0,
    ),
)


@check_arguments
def describe() -> pd.DataFrame:
    """Describe every score of :func:`histovar.tl.evaluate`: meaning, formula, source, unit, best value.

    Returns
    -------
    DataFrame
        Indexed by the column of ``uns[key]["evaluation"]``, in its order: ``meaning``, ``formula`` (LaTeX), ``source``,
        ``unit``, ``best`` (NaN for counts of genes), ``direction`` (``"higher is better"``, ``"lower is better"``,
        ``"nearer to 0.9 is better"``) and ``gene_score``, the column of the table of genes, if any.
    """
    suffixed = [
        replace(metric, name=metric.name + suffix, meaning=f"{metric.meaning}; {variant}", gene_score="")
        for suffix, variant in VARIANTS.items()
        for metric in METRICS
        if suffix in metric.variants
    ]
    rows = [{**asdict(metric), "direction": metric.direction} for metric in (*METRICS, *suffixed)]
    columns = ["meaning", "formula", "source", "unit", "best", "direction", "gene_score"]
    return pd.DataFrame(rows).set_index("name")[columns].astype({"best": float})
