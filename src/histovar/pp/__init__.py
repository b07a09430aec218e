"""Preprocessing: gene panel, gene scales, niche features."""

from .gene_panel import gene_panel
from .gene_scales import gene_scales
from .niche import niche

__all__ = ["gene_panel", "gene_scales", "niche"]
