"""Nested groups of genes, and how a group's genes are summarised and given back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor, nn

from .config import ModelConfig

# Principal components of the spots in which genes are clustered; 16 to 32 carry what histology can tell.
N_PROFILE_COMPONENTS = 24
# Genes whose windows are made at once.
GENES_AT_ONCE = 64


def group_genes(
    expression: NDArray[np.floating],
    scales: Sequence[int],
    *,
    groups: NDArray[np.integer] | None = None,
    random_state: int = 0,
) -> NDArray[np.int64]:
    """Nested groups of co-expressed genes.

    Each scale splits the groups of the coarser one by k-means on the genes' co-expression profiles (their
    loadings on the principal components of standardised expression), every group getting new groups in
    proportion to its size.

    Parameters
    ----------
    expression
        (n_spots, n_genes) of the training sections.
    scales
        Number of groups at each scale, increasing; the last is ``n_genes``.
    groups
        (n_genes,) groups numbered from 0 that the user gives, such as gene sets. They must be as many as one
        of the scales, and that scale is made of them.
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

    def clusters(members: NDArray[np.integer], n: int) -> NDArray[np.integer]:
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
                level[members] = start + clusters(members, share)
                start += share
        levels.append(level)
        parent = level
    return np.stack(levels)


def _merge(profiles: NDArray, groups: NDArray[np.integer], n: int, random_state: int) -> NDArray[np.int64]:
    """Groups that are unions of the given ones."""
    centres = np.stack([profiles[groups == g].mean(0) for g in range(groups.max() + 1)])
    labels = (
        np.zeros(len(centres), int) if n == 1 else KMeans(n, n_init=4, random_state=random_state).fit_predict(centres)
    )
    return labels[groups].astype(np.int64)


def _shares(sizes: NDArray[np.integer], total: int) -> NDArray[np.int64]:
    """Split `total` in proportion to `sizes`, at least 1 and at most the size each."""
    shares = np.ones(len(sizes), dtype=np.int64)
    for _ in range(total - len(sizes)):
        room = np.where(shares < sizes, sizes / shares, 0)
        shares[room.argmax()] += 1
    return shares


def check_groups(groups: NDArray[np.integer], scales: Sequence[int]) -> None:
    """Refuse groups that are not nested, or not those of `scales`.

    Raises
    ------
    ValueError
        Naming the scale at fault.
    """
    if groups.shape[0] != len(scales):
        raise ValueError(f"groups: {groups.shape[0]} scales given, the configuration has {len(scales)}")
    for k, (level, n) in enumerate(zip(groups, scales, strict=True)):
        if not np.array_equal(np.unique(level), np.arange(n)):
            raise ValueError(f"groups: scale {k} must use each of the groups 0 to {n - 1} at least once")
        if k and len(np.unique(np.stack([groups[k - 1], level]), axis=1).T) != n:
            raise ValueError(f"groups: scale {k} is not nested in scale {k - 1}: a group has two parents")


class GeneScales(nn.Module):
    """The linear part of tokenisation: pools standardised genes to group values, and gives them back.

    A group is summarised by the leading principal components of its genes over the training spots (by their
    mean in the reference), so pooling and giving back are one pair of matrices a scale. The finest scale is
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
        """Windows of the gene order: adaptive average pooling, and linear interpolation back to the genes."""
        n_genes = self.config.n_genes
        for k, n in enumerate(self.config.scales):
            self.groups[k] = torch.arange(n_genes) * n // n_genes
            if k < len(self.config.scales) - 1:
                pool = getattr(self, f"pool_{k}")
                for start in range(0, n_genes, GENES_AT_ONCE):
                    genes = pool[start : start + GENES_AT_ONCE]
                    each = torch.eye(len(genes), n_genes).roll(start, 1)
                    genes.copy_(nn.functional.adaptive_avg_pool1d(each[:, None], n)[:, 0])
                even = n_genes % n == 0
                how = {"mode": "nearest"} if even else {"mode": "linear", "align_corners": False}
                spread = nn.functional.interpolate(torch.eye(n)[:, None], n_genes, **how)[:, 0]
                getattr(self, f"spread_{k}").copy_(spread)

    @torch.no_grad()
    def fit(self, expression: Tensor, groups: NDArray[np.integer], random_state: int = 0) -> None:
        """Take the genes' means and standard deviations, the groups and their components from training spots.

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
        rest = self.standardize(expression).cpu().numpy()
        for k, c in enumerate(self.config.components[:-1]):
            pool = np.zeros(getattr(self, f"pool_{k}").shape, dtype=np.float32)
            for group in range(self.config.scales[k]):
                genes = np.flatnonzero(groups[k] == group)
                n = min(c, len(genes), len(rest))
                solver = "full" if len(genes) <= 500 else "randomized"
                axes = PCA(n, svd_solver=solver, random_state=random_state).fit(rest[:, genes]).components_
                pool[np.ix_(genes, group * c + np.arange(n))] = axes.T
            getattr(self, f"pool_{k}").copy_(torch.from_numpy(pool))
            getattr(self, f"spread_{k}").copy_(torch.from_numpy(pool.T))
            rest = rest - rest @ pool @ pool.T

    def standardize(self, expression: Tensor) -> Tensor:
        """Layer units to zero mean and unit variance over the training spots, gene by gene."""
        return (expression - self.mean) / self.std

    def restore(self, standardized: Tensor) -> Tensor:
        """Standardised genes back to layer units."""
        return standardized * self.std + self.mean

    def pool(self, genes: Tensor, scale: int) -> Tensor:
        """Values of the groups of one scale.

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
        """Group values of one scale given back to the genes: (..., n_groups, components) to (..., n_genes)."""
        if scale == len(self.config.scales) - 1:
            return values[..., 0]
        return values.flatten(-2) @ getattr(self, f"spread_{scale}")

    def spread_variance(self, variances: Tensor, scale: int) -> Tensor:
        """Variances of independent group values, given back to the genes; shapes as :meth:`spread`."""
        if scale == len(self.config.scales) - 1:
            return variances[..., 0]
        return variances.flatten(-2) @ getattr(self, f"spread_{scale}").square()

    def split(self, genes: Tensor) -> list[Tensor]:
        """Standardised genes as the sum of their scales' parts, without quantisation.

        Returns
        -------
        list of Tensor
            For each scale (..., n_groups, components); with residual scales, spreading and adding all of
            them gives `genes` back.
        """
        parts, rest = [], genes
        for k in range(len(self.config.scales)):
            parts.append(self.pool(rest, k))
            if self.config.residual:
                rest = rest - self.spread(parts[-1], k)
        return parts

    def parents(self) -> Tensor:
        """Index, in the coarser scale, of the group that holds each token's group; -1 at the coarsest scale.

        Returns
        -------
        Tensor
            (n_tokens,), int64.
        """
        rows = [torch.full((self.config.scales[0],), -1, device=self.groups.device)]
        for coarse, fine, n in zip(self.groups[:-1], self.groups[1:], self.config.scales[1:], strict=True):
            parent = torch.zeros(n, dtype=torch.long, device=fine.device)
            rows.append(parent.scatter_(0, fine, coarse))
        return torch.cat(rows)
