"""Write the page "Scores" from the registry of metrics: ``python docs/metrics.py``."""

import re
import unicodedata
from pathlib import Path

from histovar.metrics import METRICS

PAGE = Path(__file__).parent / "metrics.md"
HEAD = """# Scores

`hv.tl.evaluate` writes these scores into `uns["histovar"]["evaluation"]`, one row for each section and one for their
mean; `hv.metrics.describe()` returns this table as a DataFrame.

- A score with a column in `var` has a value for each gene there; its mean is over the genes for which it is defined.
- Scores *of draws* are those of joint draws instead of expected expression.
- Scores *given depth* are those of the prediction for each spot's total count.
- Where the unit is *expression*, it is the unit of the prediction.

In the formulas, $\\hat y_{ig}$ is the predicted and $y_{ig}$ the measured expression of gene $g$ in spot $i$ of $n$;
$F_{ig}$, $q$ and $\\sigma_{ig}$ are the distribution function, quantiles and standard deviation of the prediction;
$N_i$ is the total count of a spot and $r_{gh}$ the correlation of two genes over the spots; $w_{ij}$ is 0 unless spot
$j$ is a neighbour of spot $i$, and then 1 over the number of its neighbours.
"""
COLUMNS = ("score", "definition", "unit", "best", "also", "in `var`", "source")


def cite(source: str) -> str:
    """Turn the papers of a source into citations; keys in references.bib are the first author and the year."""

    def role(match: re.Match[str]) -> str:
        key = unicodedata.normalize("NFKD", match["first"]).encode("ascii", "ignore").decode().lower()
        return f"{{cite:t}}`{key}{'_raftery' * (match['second'] == 'Raftery')}{match['year']}`"

    return re.sub(r"(?P<first>[A-ZÖ]\w+)(?: et al\.| & (?P<second>\w+))? (?P<year>\d{4})", role, source)


def page() -> str:
    """The page as it should be."""
    lines = [HEAD, f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for metric in METRICS:
        cells = (
            metric.name,
            metric.meaning + (f"<br>${metric.formula}$" if metric.formula else ""),
            "" if metric.unit == "none" else metric.unit,
            "" if metric.best is None else f"{metric.best:g}",
            ", ".join(variant.strip() for variant in metric.variants),
            f"`histovar_{metric.gene_score}`" if metric.gene_score else "",
            cite(metric.source),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
