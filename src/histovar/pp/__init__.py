"""Preprocessing: tiles of a slide, embeddings, gene panel, gene scales, niche features."""

from .embed import embed
from .gene_panel import gene_panel
from .gene_scales import gene_scales
from .niche import niche

__all__ = ["embed", "gene_panel", "gene_scales", "niche"]
