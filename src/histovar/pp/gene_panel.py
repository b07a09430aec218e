"""Choose the gene panel: the genes to model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
import scanpy as sc
from anndata import AnnData
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from histovar._arguments import Count, Key, Rate, check_arguments
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys, Prefix
from histovar._torch_state import keep_threads
from histovar.anndata_io import expression, gate, slots
from histovar.anndata_io.gate import Data

from .gene_scales import genes_in_scales

logger = logging.getLogger(__name__)

Flavor = Literal["variance", "seurat", "cell_ranger", "seurat_v3"]


@check_arguments
def gene_panel(
    data: Data,
    *,
    n_genes: Annotated[Count, Field(ge=2)] = 200,
    flavor: Flavor = "variance",
    min_fraction: Rate = 0.1,
    library_key: Key | None = None,
    key_added: Prefix = DEFAULT_KEY,
    table_name: Key | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Choose the genes to model (the gene panel) from the training sections.

    Parameters
    ----------
    data
        AnnData or SpatialData of the training sections, with counts in ``X`` or log-normalised expression in
        ``layers["lognorm"]``.
    n_genes
        Number of genes.
    flavor
        ``"variance"``: genes with the largest variance of log-normalised expression over all spots. The others are
        flavors of :func:`scanpy.pp.highly_variable_genes`.
    min_fraction
        Genes must be detected in more than this fraction of the spots.
    library_key
        Column of ``obs`` with the section; scanpy's flavors rank genes within sections.
    key_added
        Prefix of the slots.
    table_name
        Table of a SpatialData.
    copy
        Return a copy of the table instead of writing in place.

    Returns
    -------
    AnnData or None
        Writes ``var[f"{key_added}_panel"]`` (boolean), ``uns[key_added]["panel"]`` and, if absent (and the object is
        in memory), ``layers["lognorm"]``: log1p of counts per 10,000.

    Raises
    ------
    ValueError
        If fewer than `n_genes` genes are detected often enough, or there are neither counts nor log-normalised values.
    """
    adata = gate.table(data, table_name, genes=True, writes=not copy)
    keys = Keys(key_added)
    slots.check_free(adata, keys, [("var", keys.panel)])
    if library_key is not None:
        gate.sections(adata, library_key)
    lognorm = None
    if not expression.is_stored(adata):
        lognorm = expression.lognorm(adata)
    detected, variance = _statistics(expression.lognorm_blocks(adata) if lognorm is None else [lognorm])
    is_detected = detected > min_fraction
    if is_detected.sum() < n_genes:
        raise ValueError(
            f"n_genes: {n_genes} genes requested, but only {int(is_detected.sum())} are detected in more than "
            f"{min_fraction:.0%} of the spots; request fewer genes or lower min_fraction"
        )
    if flavor == "variance":
        chosen = np.zeros(adata.n_vars, dtype=bool)
        chosen[np.argsort(-np.where(is_detected, variance, -np.inf), kind="stable")[:n_genes]] = True
    else:
        matrix: Any = lognorm
        if flavor == "seurat_v3":
            matrix = sparse.vstack([sparse.csr_matrix(block) for block in expression.count_blocks(adata)])
        elif lognorm is None:
            matrix = expression.lognorm(adata)
        chosen = _highly_variable(adata, matrix, is_detected, n_genes, flavor, library_key)
    if copy:
        adata = gate.copied(adata)
    with slots.writing(adata):
        expression.add_lognorm(adata, lognorm)
        if keys.scales in adata.varm and not np.array_equal(genes_in_scales(adata, keys), chosen):
            slots.drop(adata, keys, [("varm", keys.scales)], ["scales", "scales_by"])
            logger.info("varm[%r] belongs to another panel and is deleted", keys.scales)
        parameters = {"n_genes": n_genes, "flavor": flavor, "min_fraction": min_fraction}
        slots.write(adata, keys, {("var", keys.panel): chosen}, {"panel": parameters})
    logger.info("gene panel: %d of %d genes by %s, in var[%r]", n_genes, adata.n_vars, flavor, keys.panel)
    return adata if copy else None


def detected_often(adata: AnnData, min_fraction: float) -> int:
    """Count the genes detected in more than a fraction of the spots."""
    return int((_statistics(expression.lognorm_blocks(adata))[0] > min_fraction).sum())


def _statistics(blocks: Iterable[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fraction of spots in which each gene is detected, and variance of its log-normalised expression."""
    n, sums = 0, np.zeros(())
    for block in blocks:
        values = sparse.csr_matrix(block)
        gate.check_nonnegative(values.data, f"layer: {LOGNORM!r}")
        powers = (values > 0, values, values.multiply(values))
        sums = sums + np.stack([np.asarray(power.sum(0, dtype=np.float64)).ravel() for power in powers])
        n += values.shape[0]
    detected, mean, square = sums / n
    return detected, square - mean**2


def _highly_variable(
    adata: AnnData,
    matrix: Any,
    detected: NDArray[np.bool_],
    n_genes: int,
    flavor: str,
    library_key: str | None,
) -> NDArray[np.bool_]:
    """Choose highly variable genes by scanpy among the detected ones."""
    candidates = AnnData(sparse.csr_matrix(matrix), obs=adata.obs[[library_key] if library_key else []].copy())
    candidates = candidates[:, detected].copy()
    with keep_threads():
        sc.pp.highly_variable_genes(candidates, n_top_genes=n_genes, flavor=flavor, batch_key=library_key)
    chosen = detected.copy()
    chosen[detected] = candidates.var["highly_variable"].to_numpy()
    return chosen
