"""Read predicted and measured expression in the same units, and the predicted distribution."""

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

# Fewest draws from which 95 % intervals are taken, levels of the ends of such intervals, and number of quantiles that
# represent a distribution.
LEAST_DRAWS, ENDS, LEVELS = 20, (0.025, 0.975), 100
# Units of predictions that are compared with the counts in X.
OF_COUNTS = ("log_counts", "counts", "rates")
# Neighbours of a spot for scores of spatial structure: those that touch it on a hexagonal grid.
N_NEIGHBORS = 6
# Nominal levels of the central intervals whose coverage is measured.
SHARES = np.arange(0.05, 1, 0.05)

logger = logging.getLogger(__name__)


class Comparison(NamedTuple):
    """Predicted and measured expression, (n_obs, n_genes), with genes, layer and sections."""

    genes: list[str]
    layer: str
    mean: NDArray[Any]
    std: NDArray[Any]
    measured: NDArray[np.float32]
    sections: NDArray[np.str_] | None


def read_comparison(adata: AnnData, keys: Keys, layer: str | None, library_key: str | None = None) -> Comparison:
    """Read prediction and measurement in the same units; nothing is written.

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
    """Read measured expression of predicted genes; refuse units other than the prediction's.

    If `genes` are only some of the predicted genes, the check is weaker: most genes of training must be in the object.

    Raises
    ------
    KeyError, ValueError
        As :func:`read_comparison`.
    """
    columns = gate.gene_columns(adata, genes)
    predicted = str(slots.record(adata, keys)["params"].get("units", LOGNORM))
    if predicted in OF_COUNTS:
        if layer == LOGNORM:
            raise ValueError(
                f"layer: {layer!r} is in other units than the prediction, which is in {predicted}; leave layer out"
            )
        if layer == predicted:  # names the units, not a layer: a layer of that name may be a prediction
            return expression.from_counts(adata, layer, columns)
    trained = predicted_normalization(adata, keys)
    if len(genes) == len(predicted_genes(adata, keys)):
        return expression.read_expression(adata, layer, columns, sections=sections, trained=trained)
    if layer == LOGNORM and not expression.has_lognorm(adata) and trained is not None:
        if 2 * adata.n_vars < trained.n_genes:
            raise ValueError(
                f"layers[{layer!r}] would be normalised over {adata.n_vars} genes, but was over {trained.n_genes} in "
                "training; normalise before genes are dropped"
            )
    return expression.expression(adata, layer, columns).values


def try_read_measured(
    adata: AnnData, keys: Keys, genes: Sequence[str], layer: str | None, sections: NDArray[np.str_] | None
) -> tuple[NDArray[np.float32] | None, str]:
    """Read measured expression of predicted genes if there is any, else say why it cannot be compared.

    Parameters
    ----------
    adata, keys, sections
        As for :func:`read_measured`.
    genes
        Genes of the panel.
    layer
        A layer, which must exist; None for the layer of training, if it exists.

    Returns
    -------
    measured
        (n_obs, n_genes), NaN for genes that were not measured; None if no gene was measured, or in other units.
    reason
        Why the prediction cannot be compared with the layer of training; empty if it can, or no gene was measured.

    Raises
    ------
    KeyError, ValueError
        As :func:`read_measured`, if `layer` is given.
    """
    shared_genes = [gene for gene in predicted_genes(adata, keys) if gene in adata.var_names]
    if not set(genes) & set(shared_genes):
        return None, ""
    try:
        compared_layer = str(slots.record(adata, keys)["layer"]) if layer is None else layer
        values = read_measured(adata, keys, shared_genes, compared_layer, sections)
    except (KeyError, ValueError) as error:
        if layer is not None:
            raise
        return None, str(error.args[0])
    return pd.DataFrame(values, columns=shared_genes).reindex(columns=list(genes)).to_numpy(np.float32), ""


def read_individuals(
    adata: AnnData, keys: Keys, group_key: str | None, sections: NDArray[np.str_] | None
) -> NDArray[np.str_] | None:
    """Read each spot's individual (donor): from `group_key`, or else from the column of training if the object has it.

    Raises
    ------
    KeyError, ValueError
        As :func:`gate.groups`; a single section must belong to one individual, too.
    """
    if group_key is None:
        trained_key = str(slots.record(adata, keys)["params"].get("group_key", ""))
        group_key = trained_key if trained_key and trained_key in adata.obs else None
    return gate.groups(adata, group_key, np.full(adata.n_obs, "all") if sections is None else sections)


def read_neighbors(adata: AnnData, keys: Keys, sections: NDArray[np.str_] | None) -> sparse.csr_matrix | None:
    """Graph of each spot's nearest neighbours within its section; None and a warning without usable coordinates."""
    spatial_key = str(slots.record(adata, keys)["params"]["spatial_key"])
    try:
        coordinates = gate.coordinates(adata, spatial_key)
    except (KeyError, ValueError) as error:
        logger.warning("no scores of spatial structure, since the coordinates cannot be used: %s", error.args[0])
        return None
    return Neighborhoods.of(coordinates, sections, (N_NEIGHBORS,)).graphs[0]


Interval = tuple[NDArray[Any], NDArray[Any]]


class Distribution(NamedTuple):
    """A predicted distribution, computed for selected spots: that of all spots may not fit into memory.

    Parameters
    ----------
    kind
        ``"negative binomial"``, ``"draws"``, ``"quantiles"`` or ``"normal"``.
    levels
        (n_levels,) probabilities, from at most 0.025 to at least 0.975.
    of
        Function of a mask of spots, (n_obs,), and nominal levels of intervals, such as 0.9. It returns the spots'
        quantiles at ``levels``, (n_spots, n_genes, n_levels), increasing, and for each nominal level the ends of the
        central interval, (n_spots, n_genes) each.
    """

    kind: str
    levels: NDArray[Any]
    of: Callable[[NDArray[np.bool_], Sequence[float]], tuple[NDArray[Any], list[Interval]]]


def read_distribution(
    adata: AnnData, keys: Keys, mean: NDArray[Any], std: NDArray[Any], composed: Composed | None
) -> Distribution:
    """Read the predicted distribution from the best source there is: counts, draws, quantiles, or mean and std.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    mean, std
        From :func:`read_comparison`.
    composed
        From :func:`read_composed`.
    """
    if composed is not None:
        return _counts_distribution(composed)
    draws, quantiles = read_draws(adata, keys, mean.shape[1]), read_quantiles(adata, keys, mean.shape[1])
    if draws is not None and draws.shape[2] >= LEAST_DRAWS:
        sampled, levels = metrics.sample_quantiles(draws)
        return _quantile_distribution("draws", levels, lambda spots: sampled[spots])
    if quantiles is not None:
        cube, levels = quantiles
        order = levels.argsort()
        if levels.min() <= min(ENDS) and levels.max() >= max(ENDS):
            return _quantile_distribution("quantiles", levels[order], lambda spots: cube[spots][:, :, order])
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    return _quantile_distribution(
        "normal", levels, lambda spots: metrics.normal_quantiles(mean[spots], std[spots], levels).astype(np.float32)
    )


def _quantile_distribution(
    kind: str, levels: NDArray[Any], quantiles: Callable[[NDArray[np.bool_]], NDArray[Any]]
) -> Distribution:
    """Make a distribution from its quantiles; intervals are interpolated between them."""

    def of(spots: NDArray[np.bool_], shares: Sequence[float]) -> tuple[NDArray[Any], list[Interval]]:
        cube = quantiles(spots)
        return cube, [metrics.interval(cube, levels, share) for share in shares]

    return Distribution(kind, levels, of)


def _points(composed: Composed, spots: NDArray[np.bool_]) -> Iterator[torch.Tensor]:
    """Yield values of equal probability for one batch of spots after another."""
    observation, composition, units, depth = composed
    for rows in torch.from_numpy(np.flatnonzero(spots)).split(SPOTS_AT_ONCE):
        yield observation.points(composition.take(rows), units, None if depth is None else depth[rows])


def _counts_distribution(composed: Composed) -> Distribution:
    """Make the distribution of a prediction of a model that learnt from counts."""
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
    """Lower and upper end of each spot's and gene's central interval, each (n_spots, n_genes).

    Parameters
    ----------
    adata, keys, mean, std
        As for :func:`read_distribution`.
    confidence_level
        Share of the values that the interval should contain, between 0 and 1.
    spots
        (n_obs,) mask of the spots; all by default.

    Raises
    ------
    ValueError
        If draws or quantiles do not reach that far out.
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
            f"confidence_level: {confidence_level:g} reaches beyond the quantiles {levels[0]:g} to {levels[-1]:g} of "
            f"the predicted distribution ({kind}); give at most {reach:g}"
        )
    return of(spots, (confidence_level,))[1][0]


def coverage_by_share(
    distribution: Distribution, spots: NDArray[np.bool_], measured: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[Any]]:
    """Coverage of central intervals at several nominal levels: the calibration curve.

    Parameters
    ----------
    distribution
        From :func:`read_distribution`.
    spots
        (n_obs,) mask of the spots.
    measured
        (n_spots, n_genes) measured values of these spots.

    Returns
    -------
    shares
        (n_shares,) nominal levels, as far out as the distribution's quantiles reach.
    covered
        (n_shares, n_genes) share of the spots whose value lies inside the interval.
    quantiles
        (n_spots, n_genes, n_levels).
    """
    shares = [float(share) for share in SHARES if (1 - share) / 2 >= distribution.levels[0] - 1e-9]
    quantiles, intervals = distribution.of(spots, shares)
    covered = [metrics.coverage(low, high, measured) for low, high in intervals]
    return np.array(shares), np.array(covered), quantiles


def given_depth(composed: Composed | None, totals: NDArray[Any] | None) -> tuple[NDArray[Any], Distribution] | None:
    """Mean, (n_obs, n_genes), and distribution that are predicted given each spot's measured total count.

    None for predictions made at a given depth, for rates, and where counts are unknown.

    Parameters
    ----------
    composed
        From :func:`read_composed`.
    totals
        (n_obs,) total count of each spot; None where unknown.
    """
    if composed is None or composed.depth is not None or totals is None or composed.units == "rates":
        return None
    at_depth = composed._replace(depth=torch.from_numpy(totals).float().clamp(min=1))
    mean, _ = at_depth.observation.moments(at_depth.composition, at_depth.units, at_depth.depth)
    return mean.numpy(), _counts_distribution(at_depth)
