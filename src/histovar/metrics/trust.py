"""Expected accuracy of each gene on new sections, estimated from spots that were not trained on.

A section's correlation is less certain than its number of spots suggests, because neighbouring spots are alike, and
sections and individuals differ. So the effective number of spots takes autocorrelation into account, and the expected
accuracy comes from a model with random effects for sections (or individuals) and genes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import norm, t

from .accuracy import partial_pearson, pearson, without_depth

# Most spots of a section from which autocorrelation is estimated.
MOST_PAIRED = 1000
# Smallest effective number of spots: Fisher's z has a variance only from 4 spots on.
LEAST_EFFECTIVE = 4.0
# Correlations are clipped to this magnitude before Fisher's transformation.
LARGEST = 0.999
# Prior standard deviation between groups, in Fisher's z, of the accuracy of all genes: in her2st's patient C 0.02 to
# 0.07, each section predicted by members trained on two others (benchmarks/trust.py). It counts as one more group.
GROUPS_APART = 0.06
# Share of new sections or individuals whose correlation the interval should contain.
CONFIDENCE = 0.9


def effective_spots(
    predicted: NDArray[np.floating], measured: NDArray[np.floating], coordinates: NDArray[np.floating]
) -> NDArray[np.float64]:
    r"""Effective number of independent spots for the correlation of prediction and measurement, given autocorrelation.

    Two unrelated smooth maps correlate by chance far more than two maps of as many independent spots. The variance of
    their correlation is about :math:`\frac{1}{n^2} \sum_{ij} \rho_x(d_{ij}) \rho_y(d_{ij})`, with their
    autocorrelations at the distance of two spots; that of :math:`n` independent spots is :math:`1/(n - 1)` (Clifford,
    Richardson & Hémon 1989; Dutilleul 1993).

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes).
    coordinates
        (n_spots, 2).

    Returns
    -------
    ndarray
        (n_genes,) between 4 and the number of spots; the latter for genes that do not vary.
    """
    n_spots = len(coordinates)
    sampled = np.unique(np.linspace(0, n_spots - 1, min(n_spots, MOST_PAIRED)).astype(int))
    distance = cdist(coordinates[sampled], coordinates[sampled])
    n, n_classes = len(sampled), int(np.ceil(np.sqrt(len(sampled))))
    width = distance.max() / n_classes
    distance_class = np.minimum((distance / max(width, 1e-12)).astype(int), n_classes - 1)
    np.fill_diagonal(distance_class, -1)
    x, y = (_standardised(values[sampled]) for values in (predicted, measured))
    covariance = np.zeros(x.shape[1])
    for number in range(n_classes):
        pairs = sparse.csr_matrix(distance_class == number, dtype=np.float32)
        if pairs.nnz:
            covariance += (x * (pairs @ x)).sum(0) * (y * (pairs @ y)).sum(0) / pairs.nnz
    # Pairs of sampled spots represent all pairs.
    variance = 1 / n_spots + covariance / max(n * (n - 1), 1) * (n_spots - 1) / n_spots
    effective: NDArray[np.float64] = 1 + 1 / np.maximum(variance, 1 / n_spots)
    return np.clip(effective, min(LEAST_EFFECTIVE, n_spots), n_spots)


def _standardised(values: NDArray[np.floating]) -> NDArray[np.float32]:
    centred = values - values.mean(0)
    deviation = centred.std(0)
    return (centred / np.where(deviation > 0, deviation, 1)).astype(np.float32)


class SectionAccuracy(NamedTuple):
    """Accuracy of genes in a section, each (n_genes,).

    Parameters
    ----------
    z
        Fisher's z of the correlation; NaN where it is undefined.
    variance
        Sampling variance of z, from the effective number of spots.
    z_given_depth, variance_given_depth
        The same for the partial correlation given total counts; equal to the former where these are unknown.
    """

    z: NDArray[np.float64]
    variance: NDArray[np.float64]
    z_given_depth: NDArray[np.float64]
    variance_given_depth: NDArray[np.float64]


def section_accuracy(
    predicted: NDArray[np.floating],
    measured: NDArray[np.floating],
    coordinates: NDArray[np.floating],
    total_counts: NDArray[np.floating] | None,
) -> SectionAccuracy:
    """Correlation of every gene over a section's spots, and its sampling variance.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes) in the same units.
    coordinates
        (n_spots, 2).
    total_counts
        (n_spots,) total count of each spot; None where unknown.
    """
    plain = _fisher(pearson(predicted, measured), effective_spots(predicted, measured, coordinates))
    if total_counts is None:
        return SectionAccuracy(*plain, *plain)
    depth = np.log1p(np.asarray(total_counts, dtype=np.float64))
    n_effective = effective_spots(without_depth(predicted, depth), without_depth(measured, depth), coordinates)
    given = _fisher(partial_pearson(predicted, measured, total_counts), n_effective)
    return SectionAccuracy(*plain, *given)


def _fisher(
    correlation: NDArray[np.float64], n_effective: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.arctanh(np.clip(correlation, -LARGEST, LARGEST)), 1 / np.maximum(n_effective - 3, LEAST_EFFECTIVE - 3)


def p_values(sections: list[SectionAccuracy], *, cross_fitted: bool) -> NDArray[np.float64]:
    r"""P-value of each gene, (n_genes,): chance of such a correlation if nothing but depth is predicted.

    One-sided, for the mean over sections weighted by inverse variance (Stouffer's method); NaN for genes that are
    undefined in all sections. If sections are predicted from one another, noise that two sections share by chance
    counts twice, once when each is predicted from the other: with uncorrelated noise :math:`a_k` along a feature of the
    histology, the sum is over :math:`a_k \sum_{j \ne k} a_j`, whose variance is twice that of independent terms.

    Parameters
    ----------
    sections
        Accuracy in each section.
    cross_fitted
        True if sections were predicted from one another, False if by a model that has seen none of them.
    """
    z = np.array([section.z_given_depth for section in sections])
    weight = np.where(np.isnan(z), 0, 1 / np.array([section.variance_given_depth for section in sections]))
    with np.errstate(invalid="ignore"):
        score = np.nansum(weight * z, axis=0) / np.sqrt(weight.sum(0) * (2 if cross_fitted else 1))
    result: NDArray[np.float64] = norm.sf(score)
    return result


class ExpectedAccuracy(NamedTuple):
    """Expected correlation of each gene in a new section or individual, with its interval, each (n_genes,)."""

    mean: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def expected_accuracy(correlation: NDArray[np.floating], variance: NDArray[np.floating]) -> ExpectedAccuracy:
    r"""Estimate each gene's correlation in a new section or individual from its correlation in known ones.

    Fisher's z of gene :math:`g` in group :math:`k` is modelled as :math:`\mu + m_g + s_k + e_{gk}`, with normal random
    effects of genes, of groups and a residual. The variance of :math:`s_k`, by which all genes are predicted better in
    some groups, is estimated from these groups and a prior that counts as one more group; that of the residual, which
    includes sampling noise, is pooled over genes. A gene's mean is shrunk towards the mean of all genes by its
    uncertainty (empirical Bayes), so that the best of many genes are not overrated.

    Parameters
    ----------
    correlation
        (n_groups, n_genes) correlation in each group; NaN where it is undefined.
    variance
        (n_genes,) sampling variance of Fisher's z in one section.

    Returns
    -------
    ExpectedAccuracy
        The interval should contain the correlation in 90 % of new groups with about as many spots. The variance between
        groups enters by a quantile of Student's t with as many degrees of freedom as groups. NaN for genes that are
        undefined in all groups.
    """
    z = np.arctanh(np.clip(correlation, -LARGEST, LARGEST))
    n = (~np.isnan(z)).sum(0)
    defined = n > 0
    if not defined.any():
        return ExpectedAccuracy(*np.full((3, z.shape[1]), np.nan))
    z = z[~np.isnan(z).all(1)][:, defined]  # without groups in which no gene is defined
    n, noise = n[defined], np.asarray(variance, dtype=np.float64)[defined]
    n_groups, n_genes = z.shape
    gene_means = np.nanmean(z, axis=0)
    group_effects = np.nanmean(z - gene_means, axis=1)
    residuals = z - gene_means - group_effects[:, None]
    n_free = n.sum() - n_genes - (n_groups - 1)
    pooled = np.nansum(residuals**2) / n_free if n_free > 0 else noise.mean()
    # Each gene's sampling variance, scaled or increased so that its mean is the pooled variance of the residuals.
    residual_variance = noise * min(1.0, pooled / noise.mean()) + max(0.0, pooled - noise.mean())
    group_variance = ((group_effects**2).sum() + GROUPS_APART**2) / n_groups
    mean_variance = residual_variance / n
    gene_variance = max(0.0, gene_means.var(ddof=min(1, n_genes - 1)) - mean_variance.mean())
    shrinkage = gene_variance / (gene_variance + mean_variance)
    mean = gene_means.mean() + shrinkage * (gene_means - gene_means.mean())
    new_group_variance = group_variance * (1 + 1 / n_groups)
    level = (1 + CONFIDENCE) / 2
    half_width = np.sqrt(
        t.ppf(level, n_groups) ** 2 * new_group_variance
        + norm.ppf(level) ** 2 * (residual_variance + shrinkage * mean_variance)
    )
    result = np.full((3, len(defined)), np.nan)
    result[:, defined] = np.tanh([mean, mean - half_width, mean + half_width])
    return ExpectedAccuracy(*result)
