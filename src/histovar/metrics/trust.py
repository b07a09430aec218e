"""How well each gene will be predicted where it was not measured, from how well it was on spots not trained on.

A correlation over the spots of a section is less sure than their number says, as neighbours are alike, and sections and
individuals differ. So spots are counted by how many independent ones they are worth, and what is expected of a new
section rests on a model in which sections (or individuals) and genes are random effects.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import norm, t

from .accuracy import partial_pearson, pearson, without_depth

# Spots of a section by which autocorrelation is estimated.
MOST_PAIRED = 1000
# Correlations of fewer independent spots tell nothing; Fisher's z has a variance from 4 on.
LEAST_EFFECTIVE = 4.0
# Largest correlation that has a Fisher z.
LARGEST = 0.999
# Standard deviation, in Fisher's z, by which sections differ in how well all genes are predicted: of her2st's patient C
# 0.02 to 0.07, each predicted by members trained on two others (benchmarks/trust.py). It weighs as much as one group.
GROUPS_APART = 0.06
# Share of new sections or individuals whose correlation an interval is to hold.
CONFIDENCE = 0.9


def effective_spots(
    predicted: NDArray[np.floating], measured: NDArray[np.floating], coordinates: NDArray[np.floating]
) -> NDArray[np.float64]:
    r"""How many independent spots a section's are worth when prediction and measurement are correlated.

    Two smooth maps that have nothing to do with each other correlate by chance far more than as many independent spots.
    The variance of their correlation is about :math:`\frac{1}{n^2} \sum_{ij} \rho_x(d_{ij}) \rho_y(d_{ij})`, with
    their autocorrelations at the distance of two spots, and that of :math:`n` independent spots :math:`1/(n - 1)`
    (Clifford, Richardson & Hémon 1989; Dutilleul 1993).

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes).
    coordinates
        (n_spots, 2).

    Returns
    -------
    ndarray
        (n_genes,) between 4 and the number of spots, which is what is left of genes that do not vary.
    """
    n_spots = len(coordinates)
    some = np.unique(np.linspace(0, n_spots - 1, min(n_spots, MOST_PAIRED)).astype(int))
    distance = cdist(coordinates[some], coordinates[some])
    n, n_classes = len(some), int(np.ceil(np.sqrt(len(some))))
    width = distance.max() / n_classes
    which = np.minimum((distance / max(width, 1e-12)).astype(int), n_classes - 1)
    np.fill_diagonal(which, -1)
    x, y = (_standardised(values[some]) for values in (predicted, measured))
    together = np.zeros(x.shape[1])
    for number in range(n_classes):
        pairs = sparse.csr_matrix(which == number, dtype=np.float32)
        if pairs.nnz:
            together += (x * (pairs @ x)).sum(0) * (y * (pairs @ y)).sum(0) / pairs.nnz
    # Pairs among the spots looked at stand for those among all.
    variance = 1 / n_spots + together / max(n * (n - 1), 1) * (n_spots - 1) / n_spots
    effective: NDArray[np.float64] = 1 + 1 / np.maximum(variance, 1 / n_spots)
    return np.clip(effective, min(LEAST_EFFECTIVE, n_spots), n_spots)


def _standardised(values: NDArray[np.floating]) -> NDArray[np.float32]:
    centred = values - values.mean(0)
    deviation = centred.std(0)
    return (centred / np.where(deviation > 0, deviation, 1)).astype(np.float32)


class SectionAccuracy(NamedTuple):
    """How well genes were predicted in a section, each (n_genes,).

    Parameters
    ----------
    z
        Fisher's z of the correlation; NaN where that is undefined.
    variance
        Its variance, as spots happen to be these.
    z_given_depth, variance_given_depth
        The same with total counts taken out of prediction and measurement; where they are not known, the same.
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
    """Correlation of every gene over a section's spots, and how sure it is.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes) in the same units.
    coordinates
        (n_spots, 2).
    total_counts
        (n_spots,), where known.
    """
    plain = _fisher(pearson(predicted, measured), effective_spots(predicted, measured, coordinates))
    if total_counts is None:
        return SectionAccuracy(*plain, *plain)
    depth = np.log1p(np.asarray(total_counts, dtype=np.float64))
    smooth = effective_spots(without_depth(predicted, depth), without_depth(measured, depth), coordinates)
    given = _fisher(partial_pearson(predicted, measured, total_counts), smooth)
    return SectionAccuracy(*plain, *given)


def _fisher(
    correlation: NDArray[np.float64], n_effective: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.arctanh(np.clip(correlation, -LARGEST, LARGEST)), 1 / np.maximum(n_effective - 3, LEAST_EFFECTIVE - 3)


def p_values(sections: list[SectionAccuracy], *, cross_fitted: bool) -> NDArray[np.float64]:
    r"""Probability that a gene which is not predicted beyond depth correlates as highly by chance, (n_genes,).

    One-sided, of the mean over sections weighted by how sure each is (Stouffer's method); NaN where no section tells.
    Where sections are predicted from one another, what the noise of two has in common by chance counts twice, once when
    each is predicted by the other: with uncorrelated noise :math:`a_k` along a feature of the histology, the sum is of
    :math:`a_k \sum_{j \ne k} a_j`, whose variance is twice that of as many independent terms.

    Parameters
    ----------
    sections
        Of each section.
    cross_fitted
        Whether they were predicted from one another, in place of by a model that has seen none of them.
    """
    z = np.array([section.z_given_depth for section in sections])
    weight = np.where(np.isnan(z), 0, 1 / np.array([section.variance_given_depth for section in sections]))
    with np.errstate(invalid="ignore"):
        score = np.nansum(weight * z, axis=0) / np.sqrt(weight.sum(0) * (2 if cross_fitted else 1))
    result: NDArray[np.float64] = norm.sf(score)
    return result


class ExpectedAccuracy(NamedTuple):
    """Correlation of each gene that is expected of a new section or individual, and its interval, each (n_genes,)."""

    mean: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def expected_accuracy(correlation: NDArray[np.floating], variance: NDArray[np.floating]) -> ExpectedAccuracy:
    r"""What correlation to expect of a gene in a new section or individual, given that in some.

    Fisher's z of gene :math:`g` in group :math:`k` is taken to be :math:`\mu + m_g + s_k + e_{gk}`: genes, groups and
    what is left are random and normal. The variance of :math:`s_k`, how much better all genes are predicted in some
    groups, is the mean of what is found and, weighing as one more group, of what is known of others; that of
    :math:`e_{gk}`, noise of sampling spots among it, is pooled over genes. A gene's own mean is shrunk towards that of
    all genes by how sure it is (empirical Bayes), so that the best of many are not overrated.

    Parameters
    ----------
    correlation
        (n_groups, n_genes): in each group; NaN where it is undefined.
    variance
        (n_genes,): of Fisher's z in one section, as spots happen to be these.

    Returns
    -------
    ExpectedAccuracy
        The interval is to hold the correlation in 90 % of new groups, each of about as many spots as these; how far
        groups are apart enters it by the quantile of Student's t, with a degree of freedom for each group. NaN for
        genes that are undefined everywhere.
    """
    z = np.arctanh(np.clip(correlation, -LARGEST, LARGEST))
    n = (~np.isnan(z)).sum(0)
    defined = n > 0
    if not defined.any():
        return ExpectedAccuracy(*np.full((3, z.shape[1]), np.nan))
    z = z[~np.isnan(z).all(1)][:, defined]  # groups in which no gene is defined say nothing
    n, noise = n[defined], np.asarray(variance, dtype=np.float64)[defined]
    n_groups, n_genes = z.shape
    of_genes = np.nanmean(z, axis=0)
    of_groups = np.nanmean(z - of_genes, axis=1)
    left = z - of_genes - of_groups[:, None]
    n_free = n.sum() - n_genes - (n_groups - 1)
    found = np.nansum(left**2) / n_free if n_free > 0 else noise.mean()
    # Noise by each gene's own, in sum as large as it was found to be.
    rest = noise * min(1.0, found / noise.mean()) + max(0.0, found - noise.mean())
    between = ((of_groups**2).sum() + GROUPS_APART**2) / n_groups
    unsure = rest / n
    apart = max(0.0, of_genes.var(ddof=min(1, n_genes - 1)) - unsure.mean())
    kept = apart / (apart + unsure)
    middle = of_genes.mean() + kept * (of_genes - of_genes.mean())
    groups = between * (1 + 1 / n_groups)
    level = (1 + CONFIDENCE) / 2
    reach = np.sqrt(t.ppf(level, n_groups) ** 2 * groups + norm.ppf(level) ** 2 * (rest + kept * unsure))
    result = np.full((3, len(defined)), np.nan)
    result[:, defined] = np.tanh([middle, middle - reach, middle + reach])
    return ExpectedAccuracy(*result)
