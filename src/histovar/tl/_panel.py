"""Choose the default gene panel for users who skipped that step."""

from __future__ import annotations

import logging

from anndata import AnnData

from histovar._keys import Keys
from histovar.anndata_io.expression import add_lognorm
from histovar.pp.gene_panel import detected_often, gene_panel

logger = logging.getLogger(__name__)

# Number of genes, and smallest fraction of spots in which they are detected.
DEFAULT_PANEL = 200
MIN_FRACTION = 0.1


def ensure_panel(adata: AnnData, keys: Keys, n_genes: int | None = None) -> None:
    """Call :func:`histovar.pp.gene_panel` if there is no panel yet, with a log line.

    Parameters
    ----------
    adata
        Training sections.
    keys
        Slot names.
    n_genes
        Number of genes; by default 200, or as many as are detected in a tenth of the spots.
    """
    if keys.panel in adata.var:
        return
    if n_genes is None:
        add_lognorm(adata)
        n_genes = min(DEFAULT_PANEL, detected_often(adata, MIN_FRACTION))
    logger.info("no var[%r]: calling histovar.pp.gene_panel(adata, n_genes=%d)", keys.panel, n_genes)
    gene_panel(adata, n_genes=n_genes, min_fraction=MIN_FRACTION, key_added=keys.prefix)
