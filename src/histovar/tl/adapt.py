"""Adapt a trained model to a section in which a few spots are measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histovar._arguments import Count, Key, Seed, check_arguments
from histovar._keys import DEFAULT_KEY, Prefix
from histovar._torch_state import in_float32
from histovar._warn_once import warns_once
from histovar.anndata_io import gate
from histovar.anndata_io.embeddings import check_like_training
from histovar.anndata_io.expression import Counts, counts_of_values, read_expression, require_counts
from histovar.anndata_io.gate import Data
from histovar.anndata_io.histology import histology
from histovar.anndata_io.normalization import Normalization
from histovar.model import Decoding, TwoStageVARST
from histovar.model.adaptation import LEAST_MEASURED, MOST_NEIGHBORS
from histovar.model.observation import RATE_TOTAL, Composition
from histovar.prediction import Device, Predictor

from ._trained import Trained

logger = logging.getLogger(__name__)


@check_arguments
@warns_once
@in_float32
def adapt(
    data: Data,
    model: Trained,
    measured_key: Key | None = None,
    *,
    library_key: Key | None = None,
    key_added: Prefix = DEFAULT_KEY,
    batch_size: Count = 64,
    device: Device = "auto",
    random_state: Seed = 0,
    show_progress_bar: bool = False,
    table_name: Key | None = None,
) -> TwoStageVARST:
    """Adapt a model to a new section in which a few spots are measured, to predict the others.

    Predictions for the section's other spots are then corrected in gene levels (rates), in depth, and by nearby
    measured spots; the width of intervals is set by the errors on measured spots, each predicted from the others. All
    corrections are shrunk towards the trained model, the more the fewer spots there are, and each is kept only if it
    improves the prediction of measured spots from the others (see :class:`histovar.model.Adaptation`). Units and depth
    of :func:`predict` work as before. Tokens and the ranks of draws do not change.

    Parameters
    ----------
    data
        AnnData or SpatialData with the section: embeddings and coordinates of all its spots, from which neighbourhoods
        are computed as by :func:`predict`, and counts of the measured ones; expression of the others is not read. It
        may hold other sections, too.
    model
        A model that learnt from counts, both stages trained; it is not changed.
    measured_key
        Boolean column of ``obs`` that marks the measured spots: 9 or more, in one section. None if all are measured.
    library_key
        Column of ``obs`` with the section; that of training by default.
    key_added
        Prefix of the slots, for niche features computed before.
    batch_size
        Spots in a batch.
    device
        ``"auto"`` (CUDA if there is any, else the CPU) or a torch device.
    random_state
        Seed of the choice of 1,000 spots that correct their neighbours, if more are measured.
    show_progress_bar
        Show progress.
    table_name
        Table of a SpatialData.

    Returns
    -------
    TwoStageVARST
        An adapted copy for this section; ``registry["adapted"]`` has the section and the number of spots, and ``uns``
        of its predictions has ``adapted_to`` and ``n_adapted_spots``. It is saved and loaded like any model;
        :func:`predict` warns of spots of other sections.

    Raises
    ------
    KeyError
        If the column, embeddings, coordinates or genes of the panel are missing.
    ValueError
        If fewer than 9 spots are measured, or spots in several sections; if the section was trained on (if neither it
        nor the training section has a name, it is recognised by its number of spots; otherwise there is a warning); if
        the model learnt from values, or is adapted already; if X holds no counts, or expression is in other units than
        in training; if embeddings were made in another way than in training.
    """
    adata = gate.table(data, table_name, genes=True, writes=False)
    registry, config = model.registry, model.config
    if not model.var_stage.of_counts:
        raise ValueError(
            f"model: it learnt from values of {registry['layer']!r}; only a model that learnt from counts can be "
            "adapted: train with counts in X and without layer=, or use histovar.tl.calibrate"
        )
    if "adapted" in registry:
        raise ValueError(
            f"model: it is already adapted to section {registry['adapted']['section']!r}; adapt the model as trained"
        )
    if library_key is None and registry["library_key"] in adata.obs:
        library_key = registry["library_key"]
    check_like_training(adata, registry["use_rep"], registry.get("embeddings", []))
    names = gate.sections(adata, library_key, registry["spatial_key"])
    measured = _measured(adata, measured_key)
    label = _section(names, measured)
    _check_not_trained_on(label, adata.n_obs, registry)
    columns = gate.gene_columns(adata, registry["genes"])
    counts = _counts(gate.copied(adata[measured]), model, columns, label)

    in_section = np.ones(adata.n_obs, bool) if names is None else names == label
    section = gate.copied(adata[in_section])
    rows = torch.from_numpy(np.flatnonzero(measured[in_section]))
    coordinates = gate.coordinates(section, registry["spatial_key"]).astype(np.float32)
    inputs = histology(
        section,
        config,
        use_rep=registry["use_rep"],
        spatial_key=registry["spatial_key"],
        library_key=library_key,
        encoders=registry["covariates"],
        spacing_um=registry.get("spacing_um"),
        key=key_added,
    )
    adapted = deepcopy(model)
    stage2, original_device = adapted.var_stage, adapted.device
    one_section = torch.zeros(section.n_obs, dtype=torch.long, device=original_device)
    inputs = stage2.condition.align(inputs.map(lambda t: t.to(original_device)), one_section)
    is_neighbor = torch.from_numpy(np.random.default_rng(random_state).permutation(len(rows)) < MOST_NEIGHBORS)
    adaptation = stage2.add_adaptation(int(is_neighbor.sum()))
    rule = Decoding()
    predictor = Predictor(rule, rule, "rates", 0, (), False, batch_size, device, "fp32")
    prediction = predictor(
        adapted, inputs.map(lambda t: t[rows.to(original_device)]), random_state, show_progress_bar=show_progress_bar
    )
    rates, spots = torch.from_numpy(prediction.rates) / RATE_TOTAL, torch.from_numpy(prediction.spots)
    nearest_distance = cKDTree(coordinates).query(coordinates, k=2)[0][:, 1]
    stage2.cpu()
    adaptation.fit(
        stage2.observation,
        torch.from_numpy(counts.panel),
        torch.from_numpy(counts.totals.astype(np.float32)),
        Composition(rates, spots[:, 0].log(), spots[:, 1], spots[:, 2]),
        torch.from_numpy(coordinates)[rows],
        near=is_neighbor,
        novelty=float(spots[:, 3].max()),
        spacing=float(np.median(nearest_distance[nearest_distance > 0])),
    )
    stage2.to(original_device)
    adapted.registry["adapted"] = {"section": label, "n_spots": len(rows)}
    improved = adaptation.neighbors_tell
    logger.info(
        "adapted to %d of %d spots of %s: total counts times %.2f, rates changed %.2f-fold (median of genes), %s",
        len(rows),
        section.n_obs,
        f"section {label!r}" if label else "one section",
        float(adaptation.log_depth.exp()),
        float(adaptation.log_rates.abs().median().exp()),
        f"measured spots correct {' and '.join(improved)} of their neighbours"
        if improved
        else "no correction of neighbours",
    )
    return adapted


def _measured(adata: AnnData, measured_key: str | None) -> NDArray[np.bool_]:
    """Read the mask of measured spots, (n_obs,)."""
    if measured_key is None:
        gate.check_enough_spots(adata, LEAST_MEASURED, "adapt to")
        logger.warning(
            "measured_key: not given, so all %d spots count as measured; if the section has more spots, give all of "
            "them and name a column, since neighbourhoods are computed from the given spots",
            adata.n_obs,
        )
        return np.ones(adata.n_obs, bool)
    if measured_key not in adata.obs:
        raise KeyError(f"measured_key: no {measured_key!r} in obs, which has {list(adata.obs.columns)}")
    column = adata.obs[measured_key]
    if column.isna().any() or not set(column.unique().tolist()) <= {True, False}:
        raise ValueError(
            f"measured_key: obs[{measured_key!r}] must be True or False for every spot, got {column.dtype}"
        )
    measured = column.to_numpy().astype(bool)
    if measured.sum() < LEAST_MEASURED:
        raise ValueError(
            f"measured_key: {int(measured.sum())} measured spots are too few to adapt to; at least {LEAST_MEASURED} "
            "are needed"
        )
    return measured


def _section(names: NDArray[np.str_] | None, measured: NDArray[np.bool_]) -> str:
    """Find the section of the measured spots; empty if it has no name."""
    if names is None:
        return ""
    labels = np.unique(names[measured]).tolist()
    if len(labels) > 1:
        raise ValueError(
            f"measured_key: the measured spots are in {len(labels)} sections, such as {labels[:3]}; adapt a model to "
            "each of them"
        )
    return str(labels[0])


def _check_not_trained_on(label: str, n_spots: int, registry: Mapping[str, Any]) -> None:
    """Refuse a section that was trained on, recognised by its name, or without names by its number of spots."""
    trained_on = registry["sections_stage2"]
    if label in trained_on:
        raise ValueError(
            f"measured_key: section {label!r} was trained on, so errors on it are not those of a new section; it needs "
            "no adaptation"
        )
    if label:
        return
    if not trained_on and n_spots == registry["n_spots_stage2"]:
        raise ValueError(
            f"library_key: a section without a name and with {n_spots} spots, like this one, was trained on and needs "
            "no adaptation; if this is another section, name it in a column of obs"
        )
    logger.warning(
        "library_key: the section has no name, so it cannot be checked whether it, or a part of it, was trained on; if "
        "so, errors on it are not those of a new section"
    )


def _counts(adata: AnnData, model: TwoStageVARST, columns: NDArray[np.integer], label: str) -> Counts:
    """Read counts and total counts of the measured spots."""
    registry = model.registry
    values = read_expression(
        adata,
        registry["layer"],
        columns,
        sections=np.full(adata.n_obs, label),
        trained=Normalization.stored(registry.get("normalization")),
    )
    target_sum = float(model.var_stage.observation.target_sum)
    return require_counts(counts_of_values(adata, columns, values, target_sum))
