"""Nested groups of co-expressed genes, and the linear maps between genes and group values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor, nn

from .config import ModelConfig

# Principal components of expression in which genes are clustered; 16 to 32 capture what histology can predict.
N_PROFILE_COMPONENTS = 24
# Genes whose pooling windows are computed at once.
GENES_AT_ONCE = 64


def group_genes(
    expression: NDArray[np.floating],
    scales: Sequence[int],
    *,
    groups: NDArray[np.integer] | None = None,
    random_state: int = 0,
) -> NDArray[np.int64]:
    """Cluster genes into nested groups by co-expression.

    Each scale splits the groups of the coarser one by k-means on the genes' co-expression profiles (their
    loadings on the principal components of standardised expression), into numbers of subgroups in
    proportion to their sizes.

    Parameters
    ----------
    expression
        (n_spots, n_genes) of the training sections.
    scales
        Number of groups at each scale, increasing; the last is ``n_genes``.
    groups
        (n_genes,) group of each gene, numbered from 0, to use for one of the scales, such as gene sets. Their
        number must be that of one of `scales`.
    random_state
        Seed of k-means and of the principal components.

    Returns
    -------
    ndarray
        (n_scales, n_genes): the group of every gene at every scale.
    """
    n_genes = expression.shape[1]
    centred = expression - expression.mean(0)
    standardised = centred / np.where(centred.std(0) > 0, centred.std(0), 1)
    n_components = min(N_PROFILE_COMPONENTS, *standardised.shape)
    pca = PCA(n_components, svd_solver="randomized", random_state=random_state).fit(standardised)
    profiles = pca.components_.T * pca.singular_values_

    def split_group(members: NDArray[np.integer], n: int) -> NDArray[np.integer]:
        if n == len(members):
            return np.arange(n)
        labels = KMeans(n, n_init=4, random_state=random_state).fit_predict(profiles[members])
        present = np.unique(labels, return_inverse=True)[1]
        return present if present.max() + 1 == n else np.arange(len(members)) * n // len(members)

    levels: list[NDArray[np.int64]] = []
    parent = np.zeros(n_genes, dtype=np.int64)
    for n_groups in scales:
        if groups is not None and n_groups == groups.max() + 1:
            level = np.asarray(groups, dtype=np.int64)
        elif n_groups == n_genes:
            level = np.arange(n_genes)
        elif groups is not None and n_groups < groups.max() + 1:
            level = _merge(profiles, groups, n_groups, random_state)
        else:
            level = np.empty(n_genes, dtype=np.int64)
            sizes = np.bincount(parent)
            start = 0
            for group, share in enumerate(_shares(sizes, n_groups)):
                members = np.flatnonzero(parent == group)
                level[members] = start + split_group(members, share)
                start += share
        levels.append(level)
        parent = level
    return np.stack(levels)


def _merge(profiles: NDArray, groups: NDArray[np.integer], n: int, random_state: int) -> NDArray[np.int64]:
    """Merge the given groups into `n` larger ones."""
    centres = np.stack([profiles[groups == g].mean(0) for g in range(groups.max() + 1)])
    labels = (
        np.zeros(len(centres), int) if n == 1 else KMeans(n, n_init=4, random_state=random_state).fit_predict(centres)
    )
    return labels[groups].astype(np.int64)


def _shares(sizes: NDArray[np.integer], total: int) -> NDArray[np.int64]:
    """Split `total` in proportion to `sizes`; each share is at least 1 and at most the size."""
    shares = np.ones(len(sizes), dtype=np.int64)
    for _ in range(total - len(sizes)):
        priority = np.where(shares < sizes, sizes / shares, 0)
        shares[priority.argmax()] += 1
    return shares


def check_groups(groups: NDArray[np.integer], scales: Sequence[int]) -> None:
    """Refuse groups that are not nested, or whose numbers are not those of `scales`.

    Raises
    ------
    ValueError
        Naming the scale that is wrong.
    """
    if groups.shape[0] != len(scales):
        raise ValueError(f"groups: expected {len(scales)} scales, as in the configuration, got {groups.shape[0]}")
    for k, (level, n) in enumerate(zip(groups, scales, strict=True)):
        if not np.array_equal(np.unique(level), np.arange(n)):
            raise ValueError(f"groups: scale {k} must use each of the groups 0 to {n - 1} at least once")
        if k and len(np.unique(np.stack([groups[k - 1], level]), axis=1).T) != n:
            raise ValueError(
                f"groups: scale {k} is not nested in scale {k - 1}: one of its groups is split over two groups there"
            )


class GeneScales(nn.Module):
    """Linear maps of tokenisation: pool standardised genes to group values, and spread these to genes again.

    A group is summarised by the leading principal components of its genes over the training spots (by their
    mean in the reference), so pooling and spreading are a pair of matrices for each scale. The finest scale is
    the genes themselves.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        n_genes = config.n_genes
        self.register_buffer("groups", torch.zeros(len(config.scales), n_genes, dtype=torch.long))
        for k, (n, c) in enumerate(zip(config.scales[:-1], config.components[:-1], strict=True)):
            self.register_buffer(f"pool_{k}", torch.zeros(n_genes, n * c))
            self.register_buffer(f"spread_{k}", torch.zeros(n * c, n_genes))
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("std", torch.ones(n_genes))
        if not config.residual:
            self._set_windows()

    groups: Tensor
    mean: Tensor
    std: Tensor

    def _set_windows(self) -> None:
        """Set groups that are windows of the gene order: adaptive average pooling, and interpolation to the genes."""
        n_genes = self.config.n_genes
        for k, n in enumerate(self.config.scales):
            self.groups[k] = torch.arange(n_genes) * n // n_genes
            if k < len(self.config.scales) - 1:
                pool = getattr(self, f"pool_{k}")
                for start in range(0, n_genes, GENES_AT_ONCE):
                    genes = pool[start : start + GENES_AT_ONCE]
                    one_hot = torch.eye(len(genes), n_genes).roll(start, 1)
                    genes.copy_(nn.functional.adaptive_avg_pool1d(one_hot[:, None], n)[:, 0])
                even = n_genes % n == 0
                mode = {"mode": "nearest"} if even else {"mode": "linear", "align_corners": False}
                spread = nn.functional.interpolate(torch.eye(n)[:, None], n_genes, **mode)[:, 0]
                getattr(self, f"spread_{k}").copy_(spread)

    @torch.no_grad()
    def fit(self, expression: Tensor, groups: NDArray[np.integer], random_state: int = 0) -> None:
        """Learn the genes' means and standard deviations, and the groups' principal components, from training spots.

        Parameters
        ----------
        expression
            (n_spots, n_genes) in the units of the training layer.
        groups
            (n_scales, n_genes) nested groups.
        random_state
            Seed of the principal components of large groups.
        """
        if not self.config.residual:
            return
        check_groups(groups, self.config.scales)
        self.groups.copy_(torch.from_numpy(np.ascontiguousarray(groups)))
        self.mean.copy_(expression.mean(0))
        std = expression.std(0, correction=0)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))
        residual = self.standardize(expression).cpu().numpy()
        for k, c in enumerate(self.config.components[:-1]):
            pool = np.zeros(getattr(self, f"pool_{k}").shape, dtype=np.float32)
            for group in range(self.config.scales[k]):
                genes = np.flatnonzero(groups[k] == group)
                n = min(c, len(genes), len(residual))
                solver = "full" if len(genes) <= 500 else "randomized"
                with np.errstate(invalid="ignore"):  # shares of the variance, where there is none left
                    axes = PCA(n, svd_solver=solver, random_state=random_state).fit(residual[:, genes]).components_
                pool[np.ix_(genes, group * c + np.arange(n))] = axes.T
            getattr(self, f"pool_{k}").copy_(torch.from_numpy(pool))
            getattr(self, f"spread_{k}").copy_(torch.from_numpy(pool.T))
            residual = residual - residual @ pool @ pool.T

    def standardize(self, expression: Tensor) -> Tensor:
        """Standardise expression in layer units, gene by gene, by mean and standard deviation of the training spots."""
        return (expression - self.mean) / self.std

    def restore(self, standardized: Tensor) -> Tensor:
        """Turn standardised genes into layer units again."""
        return standardized * self.std + self.mean

    def pool(self, genes: Tensor, scale: int) -> Tensor:
        """Pool genes to the group values of one scale.

        Parameters
        ----------
        genes
            (..., n_genes), standardised.
        scale
            Index of the scale.

        Returns
        -------
        Tensor
            (..., n_groups, components).
        """
        if scale == len(self.config.scales) - 1:
            return genes[..., None]
        pooled = genes @ getattr(self, f"pool_{scale}")
        return pooled.unflatten(-1, (self.config.scales[scale], self.config.components[scale]))

    def spread(self, values: Tensor, scale: int) -> Tensor:
        """Spread group values of one scale to the genes: (..., n_groups, components) to (..., n_genes)."""
        if scale == len(self.config.scales) - 1:
            return values[..., 0]
        return values.flatten(-2) @ getattr(self, f"spread_{scale}")

    def spread_variance(self, variances: Tensor, scale: int) -> Tensor:
        """Spread variances of independent group values to the genes; shapes as :meth:`spread`."""
        if scale == len(self.config.scales) - 1:
            return variances[..., 0]
        return variances.flatten(-2) @ getattr(self, f"spread_{scale}").square()

    def split(self, genes: Tensor) -> list[Tensor]:
        """Split standardised genes into group values of every scale, without quantisation.

        Returns
        -------
        list of Tensor
            For each scale (..., n_groups, components); with residual scales, their spread values add up to
            `genes`.
        """
        values, residual = [], genes
        for k in range(len(self.config.scales)):
            values.append(self.pool(residual, k))
            if self.config.residual:
                residual = residual - self.spread(values[-1], k)
        return values

    def parents(self) -> Tensor:
        """Parent of each token: index of its group's group in the next coarser scale, -1 at the coarsest.

        Returns
        -------
        Tensor
            (n_tokens,), int64.
        """
        parents = [torch.full((self.config.scales[0],), -1, device=self.groups.device)]
        for coarse, fine, n in zip(self.groups[:-1], self.groups[1:], self.config.scales[1:], strict=True):
            parent = torch.zeros(n, dtype=torch.long, device=fine.device)
            parents.append(parent.scatter_(0, fine, coarse))
        return torch.cat(parents)
