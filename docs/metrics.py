"""Write the page "Scores" from the registry of metrics: ``python docs/metrics.py``."""

from pathlib import Path

from histovar.metrics import METRICS

PAGE = Path(__file__).parent / "metrics.md"
HEAD = """# Scores

What `hv.tl.evaluate` writes into `uns["histovar"]["evaluation"]`, a row a section and their mean;
`hv.metrics.describe()` has it as a DataFrame. Scores with a column in `var` are means over the genes for which they are
defined. *Expression* as a unit is that of what is predicted. In formulas, $\\hat y_{ig}$ is predicted and $y_{ig}$
measured expression of gene $g$ in spot $i$ of $n$; $F_{ig}$, $q$ and $\\sigma_{ig}$ are distribution function,
quantiles and standard deviation of the prediction, $N_i$ a spot's total count, $r_{gh}$ correlations of two genes over
the spots; $w_{ij}$ is 1 over the number of neighbours of spot $i$ for each of them.

Columns that end in *of draws* are the same of joint draws, those that end in *given depth* of what is predicted once
every spot's total count is known.
"""
COLUMNS = ("score", "what it is", "formula", "unit", "best", "also", "in `var`", "source")


def page() -> str:
    """The page as it should be."""
    lines = [HEAD, f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for metric in METRICS:
        cells = (
            metric.name,
            metric.meaning,
            f"${metric.formula}$" if metric.formula else "",
            "" if metric.unit == "none" else metric.unit,
            "" if metric.best is None else f"{metric.best:g}",
            ", ".join(variant.strip() for variant in metric.variants),
            f"`histovar_{metric.gene_score}`" if metric.gene_score else "",
            metric.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
