"""Predicted and measured expression, in the same units."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from histovar import metrics
from histovar._keys import LOGNORM, Keys
from histovar.model.observation import SPOTS_AT_ONCE

from . import expression, gate, slots
from .neighbors import Neighborhoods
from .prediction import (
    Composed,
    predicted_genes,
    predicted_normalization,
    predicted_sections,
    read_composed,
    read_draws,
    read_prediction,
    read_quantiles,
)

# Draws enough for 95 % intervals, the ends of those intervals, and levels that stand for a distribution.
LEAST_DRAWS, ENDS, LEVELS = 20, (0.025, 0.975), 100
# Units of predictions that are compared with what X holds.
OF_COUNTS = ("log_counts", "counts", "rates")
# Neighbours of a spot by which its place in a pattern is told: on a hexagonal grid, all that touch it.
N_NEIGHBORS = 6
# Shares of the values that central intervals promise to hold, at which coverage is looked at.
SHARES = np.arange(0.05, 1, 0.05)

logger = logging.getLogger(__name__)


class Comparison(NamedTuple):
    """Predicted and measured expression, (n_obs, n_genes), and of what they are."""

    genes: list[str]
    layer: str
    mean: NDArray[Any]
    std: NDArray[Any]
    measured: NDArray[np.float32]
    sections: NDArray[np.str_] | None


def read_comparison(adata: AnnData, keys: Keys, layer: str | None, library_key: str | None = None) -> Comparison:
    """Prediction and measurement in the same units; nothing is written.

    Raises
    ------
    KeyError
        If there is no prediction, no such layer, or genes of the panel are missing.
    ValueError
        If measured expression is negative or not finite, or in other units than the prediction.
    """
    genes = predicted_genes(adata, keys)
    mean, std = read_prediction(adata, keys, genes)
    layer = str(slots.record(adata, keys)["layer"]) if layer is None else layer
    sections = predicted_sections(adata, keys, library_key)
    measured = read_measured(adata, keys, genes, layer, sections)
    return Comparison(genes, layer, mean, std, measured, sections)


def read_measured(
    adata: AnnData, keys: Keys, genes: Sequence[str], layer: str, sections: NDArray[np.str_] | None
) -> NDArray[np.float32]:
    """Measured expression of a prediction's genes, refused where its units are not the prediction's.

    Where `genes` are not all of the prediction's, it is only known whether most genes of training are there.

    Raises
    ------
    KeyError, ValueError
        As :func:`read_comparison`.
    """
    columns = gate.gene_columns(adata, genes)
    predicted = str(slots.record(adata, keys)["params"].get("units", LOGNORM))
    if predicted in OF_COUNTS:
        if layer == LOGNORM:
            raise ValueError(f"layer: {layer!r} is in other units, the prediction is of {predicted}; leave layer out")
        if layer == predicted:  # which is no layer; one of that name may be a prediction
            return expression.from_counts(adata, layer, columns)
    trained = predicted_normalization(adata, keys)
    if len(genes) == len(predicted_genes(adata, keys)):
        return expression.read_expression(adata, layer, columns, sections=sections, trained=trained)
    if layer == LOGNORM and not expression.has_lognorm(adata) and trained is not None:
        if 2 * adata.n_vars < trained.n_genes:
            raise ValueError(
                f"layers[{layer!r}] would be normalised over {adata.n_vars} genes, that of training over "
                f"{trained.n_genes}; normalise before genes are dropped"
            )
    return expression.expression(adata, layer, columns).values


def read_measured_if_there(
    adata: AnnData, keys: Keys, genes: Sequence[str], layer: str | None, sections: NDArray[np.str_] | None
) -> tuple[NDArray[np.float32] | None, str]:
    """Measured expression of some genes of a prediction, and why there is none.

    Parameters
    ----------
    adata, keys, sections
        As for :func:`read_measured`.
    genes
        Genes of the panel.
    layer
        A layer that must be there; None for that of training, if it is.

    Returns
    -------
    measured
        (n_obs, n_genes), NaN for genes that were not measured; None if no gene was, or in other units.
    reason
        Why the layer of training cannot be compared with; empty where it can, or no gene was measured.

    Raises
    ------
    KeyError, ValueError
        As :func:`read_measured`, of a layer that was named.
    """
    there = [gene for gene in predicted_genes(adata, keys) if gene in adata.var_names]
    if not set(genes) & set(there):
        return None, ""
    try:
        chosen = str(slots.record(adata, keys)["layer"]) if layer is None else layer
        values = read_measured(adata, keys, there, chosen, sections)
    except (KeyError, ValueError) as error:
        if layer is not None:
            raise
        return None, str(error.args[0])
    return pd.DataFrame(values, columns=there).reindex(columns=list(genes)).to_numpy(np.float32), ""


def read_individuals(
    adata: AnnData, keys: Keys, group_key: str | None, sections: NDArray[np.str_] | None
) -> NDArray[np.str_] | None:
    """Individual of each spot, by a column that is named, or else by that of training, where the object has it.

    Raises
    ------
    KeyError, ValueError
        As :func:`gate.groups`; one section alone must be of one individual, too.
    """
    if group_key is None:
        of_training = str(slots.record(adata, keys)["params"].get("group_key", ""))
        group_key = of_training if of_training and of_training in adata.obs else None
    return gate.groups(adata, group_key, np.full(adata.n_obs, "all") if sections is None else sections)


def read_neighbors(adata: AnnData, keys: Keys, sections: NDArray[np.str_] | None) -> sparse.csr_matrix | None:
    """Graph of each spot's nearest neighbours within its section; None, with a warning, without usable coordinates."""
    spatial_key = str(slots.record(adata, keys)["params"]["spatial_key"])
    try:
        place = gate.coordinates(adata, spatial_key)
    except (KeyError, ValueError) as error:
        logger.warning("without scores of spatial structure, as coordinates cannot be used: %s", error.args[0])
        return None
    return Neighborhoods.of(place, sections, (N_NEIGHBORS,)).graphs[0]


Interval = tuple[NDArray[Any], NDArray[Any]]


class Distribution(NamedTuple):
    """A predicted distribution, of the spots that are asked for: those of all spots may not fit into memory.

    Parameters
    ----------
    kind
        ``"negative binomial"``, ``"draws"``, ``"quantiles"`` or ``"normal"``.
    levels
        (n_levels,), of which the outermost reach at least to 0.025 and 0.975.
    of
        From a mask of the spots, (n_obs,), and shares, such as 0.9, to the spots' quantiles at the levels, (n_spots,
        n_genes, n_levels), increasing, and to the ends of central intervals that promise these shares, (n_spots,
        n_genes) each.
    """

    kind: str
    levels: NDArray[Any]
    of: Callable[[NDArray[np.bool_], Sequence[float]], tuple[NDArray[Any], list[Interval]]]


def read_distribution(
    adata: AnnData, keys: Keys, mean: NDArray[Any], std: NDArray[Any], composed: Composed | None
) -> Distribution:
    """The predicted distribution, from the best there is: counts, draws, quantiles, or mean and standard deviation.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    mean, std
        What :func:`read_comparison` gave.
    composed
        What :func:`read_composed` gave.
    """
    if composed is not None:
        return _of_counts(composed)
    draws, kept = read_draws(adata, keys, mean.shape[1]), read_quantiles(adata, keys, mean.shape[1])
    if draws is not None and draws.shape[2] >= LEAST_DRAWS:
        every, levels = metrics.sample_quantiles(draws)
        return _of_quantiles("draws", levels, lambda spots: every[spots])
    if kept is not None:
        cube, levels = kept
        order = levels.argsort()
        if levels.min() <= min(ENDS) and levels.max() >= max(ENDS):
            return _of_quantiles("quantiles", levels[order], lambda spots: cube[spots][:, :, order])
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    return _of_quantiles(
        "normal", levels, lambda spots: metrics.normal_quantiles(mean[spots], std[spots], levels).astype(np.float32)
    )


def _of_quantiles(
    kind: str, levels: NDArray[Any], quantiles: Callable[[NDArray[np.bool_]], NDArray[Any]]
) -> Distribution:
    """That of which quantiles are at hand."""

    def of(spots: NDArray[np.bool_], shares: Sequence[float]) -> tuple[NDArray[Any], list[Interval]]:
        cube = quantiles(spots)
        return cube, [metrics.interval(cube, levels, share) for share in shares]

    return Distribution(kind, levels, of)


def _points(composed: Composed, spots: NDArray[np.bool_]) -> Iterator[torch.Tensor]:
    """Values of equal probability of some spots at a time."""
    observation, composition, units, depth = composed
    for rows in torch.from_numpy(np.flatnonzero(spots)).split(SPOTS_AT_ONCE):
        yield observation.points(composition.take(rows), units, None if depth is None else depth[rows])


def _of_counts(composed: Composed) -> Distribution:
    """That of a prediction from counts."""
    levels = (np.arange(LEVELS) + 0.5) / LEVELS

    def of(spots: NDArray[np.bool_], shares: Sequence[float]) -> tuple[NDArray[Any], list[Interval]]:
        observation = composed.observation
        tails = torch.tensor([(1 + side * share) / 2 for share in shares for side in (-1, 1)])
        quantiles, ends = [], []
        for points in _points(composed, spots):
            quantiles.append(observation.at_levels(points, torch.from_numpy(levels)).numpy())
            ends.append(observation.ends(points, tails).numpy())
        outer = np.concatenate(ends)
        return np.concatenate(quantiles), [(outer[..., 2 * i], outer[..., 2 * i + 1]) for i in range(len(shares))]

    return Distribution("negative binomial", levels, of)


def read_interval(
    adata: AnnData,
    keys: Keys,
    mean: NDArray[Any],
    std: NDArray[Any],
    confidence_level: float,
    spots: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ends of the central interval of each spot and gene, each (n_spots, n_genes), from the best distribution there is.

    Parameters
    ----------
    adata, keys, mean, std
        As for :func:`read_distribution`.
    confidence_level
        Share of the values that the interval is to hold, between 0 and 1.
    spots
        (n_obs,) of which; all by default.

    Raises
    ------
    ValueError
        If draws or quantiles do not reach as far out.
    """
    composed, spots = read_composed(adata, keys), np.ones(adata.n_obs, bool) if spots is None else spots
    if composed is not None:
        tails = torch.tensor([(1 - confidence_level) / 2, (1 + confidence_level) / 2])
        ends = np.concatenate([composed.observation.ends(points, tails) for points in _points(composed, spots)])
        return ends[..., 0], ends[..., 1]
    kind, levels, of = read_distribution(adata, keys, mean, std, None)
    reach = float(levels[-1] - levels[0])
    if confidence_level > reach + 1e-9:
        raise ValueError(
            f"confidence_level: {confidence_level:g} reaches beyond the levels {levels[0]:g} to {levels[-1]:g} of the "
            f"predicted distribution ({kind}); give {reach:g} at most"
        )
    return of(spots, (confidence_level,))[1][0]


def coverage_by_share(
    distribution: Distribution, spots: NDArray[np.bool_], measured: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[Any]]:
    """How often central intervals hold what was measured, against how often they promise to.

    Parameters
    ----------
    distribution
        Of :func:`read_distribution`.
    spots
        (n_obs,): those to look at.
    measured
        (n_spots, n_genes): of them.

    Returns
    -------
    shares
        (n_shares,): what is promised, as far out as the levels reach.
    covered
        (n_shares, n_genes): share of the spots whose value lies inside.
    quantiles
        (n_spots, n_genes, n_levels).
    """
    shares = [float(share) for share in SHARES if (1 - share) / 2 >= distribution.levels[0] - 1e-9]
    quantiles, intervals = distribution.of(spots, shares)
    covered = [metrics.coverage(low, high, measured) for low, high in intervals]
    return np.array(shares), np.array(covered), quantiles


def given_depth(composed: Composed | None, totals: NDArray[Any] | None) -> tuple[NDArray[Any], Distribution] | None:
    """Mean, (n_obs, n_genes), and distribution at measured total counts.

    None of predictions that were made at given ones, of rates and where counts are not known.

    Parameters
    ----------
    composed
        What :func:`read_composed` gave.
    totals
        (n_obs,) total count of each spot, where known.
    """
    if composed is None or composed.depth is not None or totals is None or composed.units == "rates":
        return None
    known = composed._replace(depth=torch.from_numpy(totals).float().clamp(min=1))
    mean, _ = known.observation.moments(known.composition, known.units, known.depth)
    return mean.numpy(), _of_counts(known)
