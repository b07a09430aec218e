"""Which genes to model."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import scanpy as sc
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from histovar._keys import DEFAULT_KEY, LOGNORM, Keys
from histovar.anndata_io import read, validate
from histovar.anndata_io.table import Data, as_table, copied, writing
from histovar.anndata_io.write import merge_uns

logger = logging.getLogger(__name__)

Flavor = Literal["variance", "seurat", "cell_ranger", "seurat_v3"]


def gene_panel(
    data: Data,
    *,
    n_genes: int = 200,
    flavor: Flavor = "variance",
    min_fraction: float = 0.1,
    library_key: str | None = None,
    key_added: str = DEFAULT_KEY,
    table_name: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Choose the genes to model, on the training sections.

    Parameters
    ----------
    data
        AnnData (or SpatialData) of the training sections, with counts in ``X`` or log-normalised expression in
        ``layers["lognorm"]``.
    n_genes
        Number of genes.
    flavor
        ``"variance"``: the largest variance of log-normalised expression over all spots. The others are those of
        :func:`scanpy.pp.highly_variable_genes`.
    min_fraction
        Only genes detected in more than this fraction of the spots.
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
        Writes ``var[f"{key_added}_panel"]`` (boolean), ``uns[key_added]["panel"]`` and, if absent,
        ``layers["lognorm"]``: log1p of counts per 10,000.

    Raises
    ------
    ValueError
        If fewer than `n_genes` genes are detected often enough, or there are neither counts nor log-normalised values.
    """
    adata = as_table(data, table_name)
    validate.check_object(adata, needs_genes=True)
    validate.sections(adata, library_key)
    if n_genes < 2:
        raise ValueError(f"n_genes must be at least 2, got {n_genes}")
    if not 0 <= min_fraction < 1:
        raise ValueError(f"min_fraction must lie in [0, 1), got {min_fraction}")
    lognorm = adata.layers[LOGNORM] if LOGNORM in adata.layers else read.lognorm(adata)
    values = sparse.csc_matrix(lognorm)
    validate.check_nonnegative(values.data, f"layer: {LOGNORM!r}")
    detected = np.asarray((values > 0).mean(0)).ravel() > min_fraction
    if detected.sum() < n_genes:
        raise ValueError(
            f"n_genes: {n_genes} genes asked for, but only {int(detected.sum())} are detected in more than "
            f"{min_fraction:.0%} of the spots; ask for fewer genes or lower min_fraction"
        )
    chosen = _rank(adata, values, detected, n_genes, flavor, library_key)
    if copy:
        adata = copied(adata)
    keys = Keys(key_added)
    with writing():
        if LOGNORM not in adata.layers:
            adata.layers[LOGNORM] = lognorm
        adata.var[keys.panel] = chosen
    merge_uns(adata, keys, {"panel": {"n_genes": n_genes, "flavor": flavor, "min_fraction": min_fraction}})
    logger.info("gene panel: %d of %d genes by %s, in var[%r]", n_genes, adata.n_vars, flavor, keys.panel)
    return adata if copy else None


def _rank(
    adata: AnnData,
    values: sparse.csc_matrix,
    detected: NDArray[np.bool_],
    n_genes: int,
    flavor: Flavor,
    library_key: str | None,
) -> NDArray[np.bool_]:
    if flavor == "variance":
        mean = np.asarray(values.mean(0)).ravel()
        score = np.asarray(values.multiply(values).mean(0)).ravel() - mean**2
        score[~detected] = -np.inf
        chosen = np.zeros(adata.n_vars, dtype=bool)
        chosen[np.argsort(-score, kind="stable")[:n_genes]] = True
        return chosen
    if flavor not in ("seurat", "cell_ranger", "seurat_v3"):
        raise ValueError(f"flavor must be 'variance', 'seurat', 'cell_ranger' or 'seurat_v3', got {flavor!r}")
    matrix = adata.X if flavor == "seurat_v3" else values
    light = AnnData(sparse.csr_matrix(matrix), obs=adata.obs[[library_key] if library_key else []].copy())
    light = light[:, detected].copy()
    sc.pp.highly_variable_genes(light, n_top_genes=n_genes, flavor=flavor, batch_key=library_key)
    chosen = detected.copy()
    chosen[detected] = light.var["highly_variable"].to_numpy()
    return chosen
