"""Calibrate the uncertainty of a trained model."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray

from histovar._arguments import Count, Key, Seed, check_arguments
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys, Prefix
from histovar._progress import progress
from histovar._spots import section_numbers
from histovar._torch_state import in_float32
from histovar._warn_once import warns_once
from histovar.anndata_io import gate
from histovar.anndata_io.embeddings import check_like_training
from histovar.anndata_io.expression import add_lognorm, counts_of_values, read_expression, require_counts
from histovar.anndata_io.gate import Data
from histovar.anndata_io.histology import histology
from histovar.anndata_io.normalization import Normalization
from histovar.anndata_io.sections import Section, Sections
from histovar.metrics.gene_trust import PanelCounts, gene_table, gene_trust, in_words
from histovar.model import Histology, TwoStageVARST
from histovar.model.observation import Composition
from histovar.prediction import Device, on_device
from histovar.training import concat_rows, cross_fit_folds

from ._trained import Trained

logger = logging.getLogger(__name__)

# Most spots to calibrate on: enough for quantiles in steps of half a per cent.
MOST_SPOTS = 4000
# Fewest spots to calibrate on: fewer say nothing about the tails of an interval.
LEAST_SPOTS = 20


@check_arguments
@warns_once
@in_float32
def calibrate(
    data: Data,
    model: Trained,
    library_key: Key | None = None,
    *,
    group_key: Key | None = None,
    key_added: Prefix = DEFAULT_KEY,
    batch_size: Count = 64,
    device: Device = "auto",
    random_state: Seed = 0,
    show_progress_bar: bool = False,
    table_name: Key | None = None,
) -> None:
    """Calibrate a model's uncertainty, and measure each gene's accuracy, on spots that its prediction has not seen.

    For a model that learnt from counts, this fits each gene's dispersion, the error of the depth and the levels of
    quantiles (:class:`histovar.model.Observation`); for other models it is split conformal prediction with normalised
    residuals, gene by gene (:class:`histovar.model.Calibration`). Afterwards quantiles, draws and standard deviations
    of :func:`predict` are calibrated, and ``uns[key_added]["calibrated"]`` is true. The accuracy of each gene on these
    spots is kept, too (:func:`histovar.get.genes`). :func:`train` calls this on its training sections; call it again
    with held-out sections if you have them, which give better intervals: of another individual, if the model is to
    predict other individuals.

    Parameters
    ----------
    data
        AnnData or SpatialData with expression, embeddings and coordinates: sections held out from training, or the
        training sections, whose spots are each predicted by the ensemble members that have not seen their section.
    model
        A model with both stages trained; its calibration is replaced in place.
    library_key
        Column of ``obs`` with the section; that of training by default.
    group_key
        Column of ``obs`` with the individual (patient, animal); that of training by default. Intervals are then
        calibrated for another individual; if some of them were trained on, for another section.
    key_added
        Prefix of the slots, for niche features computed before.
    batch_size
        Spots in a batch.
    device
        ``"auto"`` (CUDA if there is any, else the CPU) or a torch device.
    random_state
        Seed of the choice of 4,000 spots, if there are more.
    show_progress_bar
        Show progress.
    table_name
        Table of a SpatialData.

    Raises
    ------
    KeyError
        If embeddings, coordinates, sections, the layer or genes of the panel are missing.
    ValueError
        If the model has no stage 2; if there are fewer than 20 spots; if training sections are given and some of them
        are missing, or the model has no prior; or if expression is in other units than in training.
    """
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key_added)
    registry, config = model.registry, model.config
    stage2 = model.var_stage
    if "adapted" in registry:
        raise ValueError(
            f"model: it is adapted to section {registry['adapted']['section']!r}, on which it was calibrated; "
            "calibrate the model as it was trained"
        )
    gate.check_enough_spots(adata, LEAST_SPOTS, "calibrate on")
    columns = gate.gene_columns(adata, registry["genes"])
    library_key = registry["library_key"] if library_key is None else library_key
    layer, spatial_key = registry["layer"], registry["spatial_key"]
    check_like_training(adata, registry["use_rep"], registry.get("embeddings", []))
    trained = Normalization.stored(registry.get("normalization"))
    obsm = [*registry["use_rep"], spatial_key, keys.niche, keys.niche_source]
    sections = Sections(adata, library_key, layer, obsm, spatial_key)
    names = sections.names
    individuals = _individuals(adata, model, group_key, names)
    unseen = _unseen_members(adata, model, names)
    tested = [] if individuals is None else np.unique(individuals).tolist()
    # Individuals of held-out sections may have been trained on.
    known = [] if unseen.any() else sorted(set(tested) & set(registry.get("groups_stage2", [])))
    # If so, or with a single one of training, sections are compared instead.
    by_individual = not known and (len(tested) > 1 or (len(tested) == 1 and not unseen.any()))
    numbers_of_groups = section_numbers(individuals, adata.n_obs) if by_individual else sections.numbers
    chosen = np.random.default_rng(random_state).permutation(adata.n_obs)[:MOST_SPOTS]
    original_device, observation = model.device, stage2.observation

    def aligned(section: Section) -> tuple[Histology, torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = histology(
            section.adata,
            config,
            use_rep=registry["use_rep"],
            spatial_key=spatial_key,
            library_key=library_key,
            encoders=registry["covariates"],
            spacing_um=registry.get("spacing_um"),
            key=key_added,
        )
        numbers = torch.from_numpy(sections.numbers[section.rows])
        inputs = stage2.condition.align(inputs.map(lambda t: t.to(original_device)), numbers.to(original_device))
        rows = np.flatnonzero(np.isin(section.rows, chosen))
        measured = read_expression(
            section.adata,
            layer,
            columns,
            rows,
            sections=None if names is None else names[section.rows],
            trained=trained,
        )
        totals = np.zeros(len(rows), np.float32)
        if stage2.of_counts:
            target_sum = float(observation.target_sum)
            counts = require_counts(counts_of_values(section.adata, columns, measured, target_sum, rows))
            measured, totals = counts.panel, counts.totals.astype(np.float32)
        values, total, row_numbers = map(torch.from_numpy, (measured, totals, section.rows[rows]))
        return inputs.map(lambda t: t[rows]), values, total, row_numbers

    inputs, measured, totals, rows_read = concat_rows(sections.map(aligned), len(chosen))
    unseen, numbers = unseen[rows_read], numbers_of_groups[rows_read]
    groups_unseen = _are_groups_unseen(unseen, numbers)
    results: list[tuple[torch.Tensor, ...]] = []
    with on_device(model, device) as compute_device:
        member_sets = np.unique(unseen, axis=0)
        batches = [
            (members, rows)
            for members in member_sets
            for rows in torch.from_numpy(np.flatnonzero((unseen == members).all(1))).split(batch_size)
        ]
        for members, rows in progress(batches, "calibrating", show=show_progress_bar):
            batch = inputs.map(lambda t: t[rows].to(compute_device))  # noqa: B023
            member_outputs, which = None, torch.from_numpy(members) if members.any() else None
            if which is not None or stage2.of_counts:
                member_outputs = model.prior_members(batch, cross_fitted=which is not None)
                member_outputs = member_outputs if which is None else member_outputs[which]
            if stage2.of_counts:
                assert member_outputs is not None
                results.append((measured[rows], *(t.cpu() for t in model.composition(batch, member_outputs, which))))
            else:
                prediction = model.predict(batch, members=member_outputs, tokens=False)
                assert prediction.std is not None
                results.append((measured[rows], prediction.expression.cpu(), prediction.std.cpu()))
        order = torch.cat([rows for _, rows in batches])
    truth, *predicted = (torch.cat(tensors) for tensors in zip(*results, strict=True))
    if stage2.of_counts:
        composition = Composition(*predicted)
        generator = torch.Generator().manual_seed(random_state)
        known_totals = totals[order].clamp(min=1)
        groups = torch.from_numpy(numbers)[order].unique(return_inverse=True)[1] if groups_unseen else None
        fitted_observation = deepcopy(observation).cpu()
        fitted_observation.fit(
            truth, known_totals, composition, groups, of_individuals=by_individual, generator=generator
        )
        predicted_values = torch.cat(
            [
                fitted_observation.moments(composition.take(rows), "lognorm")[0]
                for rows in torch.arange(len(truth)).split(batch_size)
            ]
        )
        values, panel_counts = (
            model.lognorm(truth, known_totals[:, None]),
            PanelCounts(truth.numpy(), known_totals.numpy()),
        )
    else:
        fitted_calibration = deepcopy(stage2.calibration).cpu()
        fitted_calibration.fit(truth, *predicted)
        predicted_values, values, panel_counts = predicted[0], truth, None
    trust = gene_trust(
        predicted_values.clamp(min=0).numpy(),
        values.numpy(),
        panel_counts,
        gate.coordinates(adata, spatial_key)[rows_read][order],
        sections=sections.numbers[rows_read][order],
        groups=_labels(individuals if by_individual else names, adata.n_obs)[rows_read][order],
        of=("individual" if by_individual else "section") if groups_unseen else "same section",
        cross_fitted=bool(unseen.any()),
        random_state=random_state,
    )
    # Written only now, so that an error before leaves object and model as they were.
    if layer == LOGNORM:
        add_lognorm(adata)
    if stage2.of_counts:
        observation.load_state_dict(fitted_observation.state_dict())
    else:
        stage2.calibration.load_state_dict(fitted_calibration.state_dict())
    registry.pop("trust", None)
    if trust is not None:
        registry["trust"] = trust
    labels = [] if names is None else np.unique(names).tolist()
    registry["calibration"] = {"sections": labels, "n_spots": len(truth), "groups": tested}
    logger.info(
        "calibrated on %d spots of %s: %s",
        len(truth),
        labels or "one section",
        f"individuals {tested}"
        if by_individual and groups_unseen
        else f"individuals {known} were trained on: not tested on another individual"
        if known
        else "individuals are not named (group_key=) or only one: not tested on another individual",
    )
    if trust is not None:
        logger.info(in_words(gene_table(registry)))


def _labels(names: NDArray[np.str_] | None, n_obs: int) -> NDArray[np.str_]:
    return np.full(n_obs, "all") if names is None else names


def _individuals(
    adata: AnnData, model: TwoStageVARST, group_key: str | None, names: NDArray[np.str_] | None
) -> NDArray[np.str_] | None:
    """Read each spot's individual, from `group_key` or else the column of training if the object has it."""
    if group_key is None and model.registry.get("group_key") in adata.obs:
        group_key = model.registry["group_key"]
    return gate.groups(adata, group_key, names)


def _are_groups_unseen(unseen: NDArray[np.bool_], groups: NDArray[np.integer]) -> bool:
    """True if the members that predict a spot have seen no other spot of its group."""
    pairs = np.unique(np.column_stack([groups, unseen]), axis=0)
    return len(pairs) == len(np.unique(groups))


def _unseen_members(adata: AnnData, model: TwoStageVARST, names: NDArray[np.str_] | None) -> NDArray[np.bool_]:
    """Mask of the ensemble members that have not seen each training spot, (n_obs, n_members); False for other spots."""
    registry, n_members = model.registry, model.config.n_members
    training_sections = registry["sections_stage2"]
    labels = np.full(adata.n_obs, "") if names is None else names
    trained_on = (
        np.isin(labels, training_sections)
        if training_sections
        else np.full(adata.n_obs, registry["n_spots_stage2"] == adata.n_obs)
    )
    unseen = np.zeros((adata.n_obs, n_members), bool)
    if not trained_on.any():
        return unseen
    if n_members == 0:
        raise ValueError(
            "model: it has no prior (n_members=0), and so no member that has not seen the training sections; calibrate "
            "on held-out sections"
        )
    if int(trained_on.sum()) != registry["n_spots_stage2"]:
        raise ValueError(
            f"adata: {int(trained_on.sum())} spots are in sections that the model was trained on, which had "
            f"{registry['n_spots_stage2']}; give all of these, by which it is known which member has seen which, or "
            "only held-out sections"
        )
    rows = np.flatnonzero(trained_on)
    coordinates = gate.coordinates(adata, registry["spatial_key"])[rows]
    n_folds = model.var_stage.prior.n_folds if model.var_stage.prior is not None else 1
    individuals = _trained_individuals(adata, registry, names)
    trained_individuals = None if individuals is None else individuals[rows]
    folds = cross_fit_folds(labels[rows] if training_sections else None, coordinates, n_members, trained_individuals)
    if folds.max() + 1 != n_folds:
        raise ValueError(
            "model: it is unknown which of its members have seen which of these spots, because it is of an earlier "
            "version; calibrate on held-out sections"
        )
    left_out = np.arange(n_members) % (folds.max() + 1)
    unseen[rows] = folds[:, None] == left_out
    return unseen


def _trained_individuals(
    adata: AnnData, registry: dict[str, Any], names: NDArray[np.str_] | None
) -> NDArray[np.str_] | None:
    """Read each spot's individual as in training; None if training had none.

    Raises
    ------
    KeyError
        If the column is missing.
    ValueError
        If individuals of training are missing from it.
    """
    trained = registry.get("groups_stage2") or []
    if not trained:
        return None
    individuals = gate.groups(adata, registry["group_key"], names)
    assert individuals is not None
    unknown = sorted(set(trained) - set(map(str, np.unique(individuals))))
    if unknown:
        raise ValueError(
            f"group_key: obs[{registry['group_key']!r}] lacks individuals {unknown[:3]} of training; give all "
            "training sections as they were, or held-out sections"
        )
    return individuals
