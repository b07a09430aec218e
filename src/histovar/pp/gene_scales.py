"""Group genes into nested scales."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from histovar._arguments import CollectionOf, Increasing, Key, Seed, check_arguments
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys, Prefix
from histovar._spots import sampled_spots
from histovar.anndata_io import gate, slots
from histovar.anndata_io.expression import add_lognorm, expression
from histovar.anndata_io.gate import Data
from histovar.model import group_genes

logger = logging.getLogger(__name__)


@check_arguments
def gene_scales(
    data: Data,
    *,
    scales: Increasing = (1, 8, 32),
    gene_sets: Mapping[Key, CollectionOf[Key]] | None = None,
    layer: Key | None = None,
    key_added: Prefix = DEFAULT_KEY,
    random_state: Seed = 0,
    table_name: Key | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Group the panel's genes into nested scales, by co-expression or by gene sets.

    Parameters
    ----------
    data
        AnnData or SpatialData of the training sections, with a gene panel (see :func:`gene_panel`).
    scales
        Number of groups at each scale, increasing; single genes are added as the last scale. Scales with at least as
        many groups as there are genes are left out.
    gene_sets
        Names and genes of sets, such as pathways, which form one of the scales. A gene in several sets belongs to the
        first; genes in none form one more set. The scale with the nearest number of groups is replaced; coarser scales
        are unions of the sets, finer ones split them.
    layer
        Layer with expression; by default ``layers["lognorm"]``, computed from the counts in ``X`` if absent. At most
        10,000 spots, drawn at random, are used.
    key_added
        Prefix of the slots.
    random_state
        Seed of the clustering.
    table_name
        Table of a SpatialData.
    copy
        Return a copy of the table instead of writing in place.

    Returns
    -------
    AnnData or None
        Writes ``varm[f"{key_added}_scales"]`` (n_vars, n_scales), the group of each panel gene at each scale and -1
        for other genes, and ``uns[key_added]["scales"]``, the number of groups at each scale.

    Raises
    ------
    KeyError
        If there is no panel, or no such layer.
    ValueError
        If `scales` do not increase, or the gene sets share no gene with the panel.
    """
    adata = gate.table(data, table_name, genes=True, writes=not copy)
    keys = Keys(key_added)
    slots.check_free(adata, keys, [("varm", keys.scales)])
    columns = np.flatnonzero(gate.panel(adata, keys))
    n_groups = [n for n in scales if n < len(columns)] + [len(columns)]
    set_groups = None
    if gene_sets is not None:
        set_groups = _assign_sets(gene_sets, adata.var_names[columns].tolist())
        n_sets = int(set_groups.max()) + 1
        nearest = min(range(len(n_groups) - 1), key=lambda i: abs(n_groups[i] - n_sets)) if len(n_groups) > 1 else 0
        coarser = [n for n in n_groups[:nearest] if n < n_sets]
        n_groups = [*coarser, n_sets, *(n for n in n_groups[nearest + 1 :] if n > n_sets)]
    rows = sampled_spots(adata.n_obs, random_state)
    values = expression(adata, LOGNORM if layer is None else layer, columns, rows).values
    groups = group_genes(values, n_groups, groups=set_groups, random_state=random_state)
    table = np.full((adata.n_vars, len(n_groups)), -1, dtype=np.int32)
    table[columns] = groups.T
    entries = {"scales": np.array(n_groups), "scales_by": "co-expression" if gene_sets is None else "gene sets"}
    if copy:
        adata = gate.copied(adata)
    with slots.writing(adata):
        if layer is None:
            add_lognorm(adata)
        slots.write(adata, keys, {("varm", keys.scales): table}, entries)
    logger.info("gene scales: %s groups, in varm[%r]", n_groups, keys.scales)
    return adata if copy else None


def genes_in_scales(adata: AnnData, keys: Keys) -> NDArray[np.bool_]:
    """Mask of the genes with a group at every scale: those of the panel for which the scales were made.

    Raises
    ------
    ValueError
        If the slot is not numeric.
    """
    groups = np.asarray(adata.varm[keys.scales])
    if groups.dtype.kind not in "fiu":
        raise ValueError(
            f"adata: varm[{keys.scales!r}] has data type {groups.dtype}, expected group numbers; call "
            "histovar.pp.gene_scales(adata) again"
        )
    return np.asarray((groups >= 0).all(1))


def _assign_sets(gene_sets: Mapping[str, Sequence[str]], genes: list[str]) -> NDArray[np.int64]:
    """Assign each gene the number of its set, (n_genes,); genes in no set get the last number."""
    position = {gene: i for i, gene in enumerate(genes)}
    labels = np.full(len(genes), len(gene_sets), dtype=np.int64)
    for number, members in reversed(list(enumerate(gene_sets.values()))):
        labels[[position[g] for g in members if g in position]] = number
    if (labels == len(gene_sets)).all():
        raise ValueError(
            f"gene_sets: none of their genes is in the panel ({genes[:3]}, ...); names must match (symbols or "
            "identifiers, upper or lower case)"
        )
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)
