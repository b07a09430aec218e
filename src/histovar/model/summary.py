"""Summarise in words what a model was trained on and what it predicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .config import ModelConfig

# Number of genes to name in a summary.
GENES_NAMED = 6


def summarize(registry: Mapping[str, Any], config: ModelConfig) -> dict[str, str]:
    """Summarise a trained model as a table of facts: genes, embeddings, training data, calibration.

    Parameters
    ----------
    registry, config
        Registry and configuration of the model.

    Returns
    -------
    dict
        Names and values of the known facts, as text.
    """
    genes, description = list(map(str, registry.get("genes", []))), registry.get("description") or {}
    embeddings = zip(registry.get("use_rep", []), registry.get("embedding_dims", []), strict=True)
    calibration, adapted = registry.get("calibration") or {}, registry.get("adapted") or {}
    facts = {
        "Tissue": description.get("tissue"),
        "Species": description.get("species"),
        "Licence": description.get("licence"),
        "Genes": f"{len(genes):,}: {_names(genes[:GENES_NAMED])}{', ...' * (len(genes) > GENES_NAMED)}"
        if genes
        else "",
        "Units of training": str(registry.get("units", "")),
        "Embeddings": ", ".join(f"{name} ({width:,} numbers)" for name, width in embeddings),
        "Embedded by": embedded_by(registry),
        "Tokens": f"{_names(config.scales)} at each scale, of {config.codebook_size:,} codes",
        "Neighbourhoods": ", ".join(map(str, config.n_neighbors)) + " spots" if config.n_neighbors else "",
        "Covariates": _names(registry.get("covariates", {})),
        "Gene tokens learnt from": _spots(registry, "stage1"),
        "Prediction learnt from": _spots(registry, "stage2"),
        "Individuals": _names(registry.get("groups_stage2", [])),
        "Intervals calibrated on": f"{calibration['n_spots']:,} spots of {_names(calibration['sections'])}"
        if calibration
        else "",
        "Adapted to": f"{adapted['n_spots']:,} spots of {adapted['section'] or 'a section'}, and for that section alone"
        if adapted
        else "",
    }
    return {name: text for name, text in facts.items() if text}


def embedded_by(registry: Mapping[str, Any]) -> str:
    """Describe encoder, layers and field of each embedding, as far as they are recorded."""
    records = [record for record in registry.get("embeddings", []) if record]
    return "; ".join(
        f"{r['encoder']}, {r['pooling']}{' of blocks ' + r['layers'] if r['layers'] else ''}, {r['field_um']:g} um"
        for r in records
    )


def _names(names: Iterable[object]) -> str:
    """Join names by commas."""
    return ", ".join(map(str, names))


def _spots(registry: Mapping[str, Any], stage: str) -> str:
    """Describe the spots and sections that a stage was trained on."""
    if f"n_spots_{stage}" not in registry:
        return ""
    sections = list(registry.get(f"sections_{stage}", []))
    return f"{registry[f'n_spots_{stage}']:,} spots of {len(sections)} section{'s' * (len(sections) != 1)}: " + _names(
        sections
    )
