"""Confidence intervals of mean scores, by a bootstrap of sections or individuals."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field

from histovar._arguments import Count, ListOf, Rate, Seed, check_arguments

# More resamples would not visibly change an interval.
MOST_RESAMPLES = 100_000


@check_arguments
def bootstrap_interval(
    scores: pd.DataFrame,
    clusters: ListOf[str],
    *,
    confidence_level: Rate = 0.95,
    n_resamples: Annotated[Count, Field(le=MOST_RESAMPLES)] = 1000,
    random_state: Seed = 0,
) -> pd.DataFrame:
    """Confidence intervals of means over sections, by a bootstrap of whole clusters (percentile method).

    Sections of one individual are alike, and so are spots of one section: treated as independent, they would make
    intervals many times too narrow. So individuals are drawn, with replacement and with all their sections (Davison &
    Hinkley 1997, section 3.8). With few clusters, intervals are still too narrow.

    Parameters
    ----------
    scores
        One row per section, one column per score.
    clusters
        The individual of each section, or the section itself.
    confidence_level
        Share of intervals that should contain the mean over the population of clusters.
    n_resamples
        Number of bootstrap samples.
    random_state
        Seed.

    Returns
    -------
    DataFrame
        Rows ``low`` and ``high``; NaN for scores that are defined in fewer than 2 clusters.
    """
    if not len(scores):
        raise ValueError("scores: expected at least one row, got none")
    if len(clusters) != len(scores):
        raise ValueError(f"clusters: expected {len(scores)}, one a row of scores, got {len(clusters)}")
    names, which = np.unique(np.array(clusters, dtype=str), return_inverse=True)
    values = scores.to_numpy(dtype=np.float64)
    defined = np.isfinite(values)
    members = np.eye(len(names))[:, which]  # (n_clusters, n_sections)
    sums, sizes = members @ np.where(defined, values, 0), members @ defined
    rng = np.random.default_rng(random_state)
    times_drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), n_resamples)
    n_sections = times_drawn @ sizes
    with np.errstate(invalid="ignore"):
        means = times_drawn @ sums / n_sections
    ends = np.full((2, scores.shape[1]), np.nan)
    enough = (sizes > 0).sum(0) > 1
    levels = (1 - confidence_level) / 2, (1 + confidence_level) / 2
    ends[:, enough] = np.nanquantile(means[:, enough], levels, axis=0)
    return pd.DataFrame(ends, index=pd.Index(["low", "high"]), columns=scores.columns)
