"""Predicted and measured expression, in the same units."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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


def read_distribution(
    adata: AnnData, keys: Keys, mean: NDArray[Any], std: NDArray[Any]
) -> tuple[str, NDArray[Any], NDArray[Any]]:
    """The predicted distribution as quantiles, from the best there is: draws, quantiles, or mean and deviation.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    mean, std
        What :func:`read_comparison` gave.

    Returns
    -------
    kind
        ``"negative binomial"``, ``"draws"``, ``"quantiles"`` or ``"normal"``.
    quantiles
        (n_obs, n_genes, n_levels), increasing.
    levels
        (n_levels,), of which the outermost reach at least to 0.025 and 0.975.
    """
    composed = read_composed(adata, keys)
    if composed is not None:
        return "negative binomial", *composed_quantiles(composed)
    draws, quantiles = read_draws(adata, keys, mean.shape[1]), read_quantiles(adata, keys, mean.shape[1])
    if draws is not None and draws.shape[2] >= LEAST_DRAWS:
        return "draws", *metrics.sample_quantiles(draws)
    if quantiles is not None:
        cube, levels = quantiles
        order = levels.argsort()
        if levels.min() <= min(ENDS) and levels.max() >= max(ENDS):
            return "quantiles", cube[:, :, order], levels[order]
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    return "normal", metrics.normal_quantiles(mean, std, levels).astype(np.float32), levels


def read_interval(
    adata: AnnData, keys: Keys, mean: NDArray[Any], std: NDArray[Any], confidence_level: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ends of the central interval of each spot and gene, each (n_obs, n_genes), from the best distribution there is.

    Parameters
    ----------
    adata, keys, mean, std
        As for :func:`read_distribution`.
    confidence_level
        Share of the values that the interval is to hold, between 0 and 1.

    Raises
    ------
    ValueError
        If draws or quantiles do not reach as far out.
    """
    ends = np.array([(1 - confidence_level) / 2, (1 + confidence_level) / 2])
    composed = read_composed(adata, keys)
    if composed is not None:
        quantiles, _ = composed_quantiles(composed, ends)
        return quantiles[..., 0], quantiles[..., 1]
    kind, quantiles, levels = read_distribution(adata, keys, mean, std)
    if ends[0] < levels[0] - 1e-9 or ends[1] > levels[-1] + 1e-9:
        raise ValueError(
            f"confidence_level: {confidence_level:g} reaches beyond the levels {levels[0]:g} to {levels[-1]:g} of the "
            f"predicted distribution ({kind}); give {levels[-1] - levels[0]:g} at most"
        )
    return metrics.interval(quantiles, levels, confidence_level)


def coverage_by_share(
    quantiles: NDArray[Any], levels: NDArray[Any], measured: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often central intervals hold what was measured, against how often they promise to.

    Parameters
    ----------
    quantiles, levels
        Of :func:`read_distribution`.
    measured
        (n_obs, n_genes).

    Returns
    -------
    shares
        (n_shares,): what is promised, as far out as the levels reach.
    covered
        (n_shares, n_genes): share of the spots whose value lies inside.
    """
    shares = np.array([share for share in SHARES if (1 - share) / 2 >= levels[0] - 1e-9])
    ends = (metrics.interval(quantiles, levels, float(share)) for share in shares)
    return shares, np.array([metrics.coverage(low, high, measured) for low, high in ends])


def composed_quantiles(
    composed: Composed, levels: NDArray[np.float64] | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Quantiles of a prediction from counts, (n_obs, n_genes, n_levels), and their levels.

    Parameters
    ----------
    composed
        Of :func:`read_composed`.
    levels
        (n_levels,) between 0 and 1; levels that stand for the distribution by default.
    """
    observation, composition, units, depth = composed
    levels = (np.arange(LEVELS) + 0.5) / LEVELS if levels is None else levels
    found = []
    for rows in torch.arange(len(composition.rates)).split(SPOTS_AT_ONCE):
        points = observation.points(composition.take(rows), units, None if depth is None else depth[rows])
        found.append(observation.at_levels(points, torch.from_numpy(levels)).numpy())
    return np.concatenate(found), levels


class GivenDepth(NamedTuple):
    """What a prediction from counts says of spots whose total count is known.

    Parameters
    ----------
    mean
        (n_obs, n_genes).
    quantiles
        (n_obs, n_genes, n_levels).
    levels
        (n_levels,).
    """

    mean: NDArray[Any]
    quantiles: NDArray[Any]
    levels: NDArray[Any]


def read_given_depth(adata: AnnData, keys: Keys, totals: NDArray[Any] | None) -> GivenDepth | None:
    """A prediction at the measured total counts; None where it was made at given ones, or either is not there.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    totals
        (n_obs,) total count of each spot, where known.
    """
    composed = read_composed(adata, keys)
    if composed is None or composed.depth is not None or totals is None or composed.units == "rates":
        return None
    known = composed._replace(depth=torch.from_numpy(totals).float().clamp(min=1))
    mean, _ = known.observation.moments(known.composition, known.units, known.depth)
    return GivenDepth(mean.numpy(), *composed_quantiles(known))
