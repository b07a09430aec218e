"""Preprocessing: tiles of a slide, embeddings, gene panel, gene scales, niche features."""

from .embed import embed
from .gene_panel import gene_panel
from .gene_scales import gene_scales
from .niche import niche
from .tile import tile

__all__ = ["embed", "gene_panel", "gene_scales", "niche", "tile"]
