"""Train stage 2: gene tokens from histology embeddings."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import numpy as np
import torch
from pydantic import InstanceOf

from histovar._arguments import Key, KeyList, KeyOrKeys, Seed, check_arguments
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys, Prefix
from histovar._spots import section_numbers
from histovar._torch_state import in_float32
from histovar._warn_once import warns_once
from histovar.anndata_io import gate, spacing
from histovar.anndata_io.embeddings import record_of
from histovar.anndata_io.expression import add_lognorm, counts_of_values, read_expression
from histovar.anndata_io.gate import Data
from histovar.anndata_io.histology import check_embeddings, covariate_width, histology, learn_covariates
from histovar.anndata_io.images import scale_factors
from histovar.anndata_io.normalization import Normalization
from histovar.anndata_io.sections import Section, Sections
from histovar.model import ModelConfig, TwoStageVARST
from histovar.model.card import AFTER_TRAINING
from histovar.training import MeasuredSpots, Stage2Trainer, checkpoint_directory, one_training_at_a_time, seeded

from ._trained import TrainedStage1


@check_arguments
@warns_once
@one_training_at_a_time
@in_float32
def train_stage2(
    data: Data,
    model: TrainedStage1,
    *,
    use_rep: KeyOrKeys,
    library_key: Key | None = None,
    group_key: Key | None = None,
    spatial_key: Key = "spatial",
    covariates: KeyList = (),
    config: InstanceOf[ModelConfig] | None = None,
    key_added: Prefix = DEFAULT_KEY,
    random_state: Seed = 0,
    table_name: Key | None = None,
    **options: Any,
) -> TwoStageVARST:
    """Train stage 2, which predicts gene tokens from histology, on sections with expression and embeddings.

    Parameters
    ----------
    data
        AnnData or SpatialData of the training sections, with the panel's genes; in memory, backed, or with dask or zarr
        arrays, which are read section by section, twice, into a temporary directory (about 3 kB per spot).
    model
        A model with a trained stage 1. It gets the new stage 2 when training is finished; if training fails or is
        interrupted, it is not changed.
    use_rep
        Key of ``obsm`` with the embedding of the H&E around each spot; or several, the spot's own first, then wider
        fields.
    library_key
        Column of ``obs`` with the section. Neighbours are sought within it, and one section is held out for validation
        (early stopping).
    group_key
        Column of ``obs`` with the individual (patient, animal) of each section. With two or more individuals, the
        prior's folds, and with them calibration, are by individual; of three or more, one is held out for validation.
    spatial_key
        Key of ``obsm`` with coordinates, (n_obs, 2).
    covariates
        Columns of ``obs``, categorical or numeric, to predict from in addition to histology.
    config
        Configuration; by default the model's own, with the embeddings' widths. Fields of stage 1 must be the model's.
    key_added
        Prefix of the slots.
    random_state
        Seed.
    table_name
        Table of a SpatialData.
    **options
        Further fields of :class:`histovar.training.TrainingOptions`. With ``checkpoint_dir``, interrupted training
        continues with ``resume_from`` set to the same directory.

    Returns
    -------
    TwoStageVARST
        The same `model`, now with a trained stage 2.

    Raises
    ------
    KeyError
        If a key, a layer or a gene of the panel is missing.
    ValueError
        If embeddings or expression are not finite, a section has too few spots for its neighbourhoods, or the
        configuration does not fit the model; if expression is in other units than in stage 1; if an option is out of
        range, or ``checkpoint_dir`` has checkpoints of another training.
    TypeError
        If an option is unknown or of another type.
    FloatingPointError
        If training diverges.
    """
    trainer_options = {**options, "random_state": random_state}
    checked = Stage2Trainer.checked_options(trainer_options)
    random_state = checked.random_state
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key_added)
    reps = list(use_rep)  # a single key has become a list
    layer = model.registry["layer"]
    trained = Normalization.stored(model.registry.get("normalization"))
    target_sum = 0.0 if trained is None else trained.target_sum
    coordinates = gate.coordinates(adata, spatial_key)
    obsm = [*reps, spatial_key, keys.niche, keys.niche_source]
    sections = Sections(adata, library_key, layer, obsm, spatial_key)
    individuals = gate.groups(adata, group_key, sections.names)
    numbers = None if individuals is None else section_numbers(individuals, adata.n_obs)
    columns = gate.gene_columns(adata, model.registry["genes"])
    widths = check_embeddings(adata, reps)
    spacing_um = spacing.of_training(adata, coordinates, sections.names, library_key, reps)
    encoders = learn_covariates(adata, covariates)
    stage2_config = (model.config if config is None else config).replace(
        embedding_dims=widths, n_covariates=covariate_width(encoders)
    )

    def measured(section: Section) -> MeasuredSpots:
        inputs = histology(
            section.adata,
            stage2_config,
            use_rep=reps,
            spatial_key=spatial_key,
            library_key=library_key,
            encoders=encoders,
            spacing_um=spacing_um,
            key=key_added,
        )
        names = None if sections.names is None else sections.names[section.rows]
        values = read_expression(section.adata, layer, columns, sections=names, trained=trained)
        # For other layers, it is unknown how their values depend on depth.
        counts = counts_of_values(section.adata, columns, values, target_sum) if layer == LOGNORM else None
        panel, totals = (None, None) if counts is None else (torch.from_numpy(counts.panel), counts.totals)
        rows = section.rows
        individual_numbers = None if numbers is None else numbers[rows]
        return MeasuredSpots(
            inputs,
            torch.from_numpy(values),
            sections.numbers[rows],
            coordinates[rows],
            individual_numbers,
            panel,
            totals,
        )

    trainee = _with_own_weights(model)
    with checkpoint_directory(checked), sections.scratch() as scratch:
        measured_sections = sections.map(measured)
        with seeded(random_state):
            trainee.add_stage2(stage2_config)
        if target_sum:
            trainee.var_stage.observation.target_sum.fill_(target_sum)
        for name in AFTER_TRAINING:
            trainee.registry.pop(name, None)
        trainee.registry |= {
            "use_rep": reps,
            "embedding_dims": list(widths),
            "spatial_key": spatial_key,
            "library_key": library_key,
            "covariates": encoders,
            "n_spots_stage2": adata.n_obs,
            "sections_stage2": [] if sections.names is None else np.unique(sections.names).tolist(),
            "group_key": group_key,
            "groups_stage2": [] if individuals is None else np.unique(individuals).tolist(),
            "embeddings": [record_of(adata, rep) for rep in reps],
            "spacing_um": spacing_um,
            "images": scale_factors(adata.uns.get("spatial")),
        }
        Stage2Trainer(trainee, **trainer_options).fit(measured_sections, adata.n_obs, scratch)
    if layer == LOGNORM:
        add_lognorm(adata)
    model.cpu().eval().requires_grad_(False)
    model.stage2, model.registry, model.history = trainee.stage2, trainee.registry, trainee.history
    model.config = model.stage1.config = trainee.config
    return model


def _with_own_weights(model: TwoStageVARST) -> TwoStageVARST:
    """Copy a model without its stage 2, so that training the copy does not change the model."""
    trainee = copy(model)
    trainee._modules = {"stage1": deepcopy(model.stage1), "stage2": None}
    trainee.registry, trainee.history = deepcopy(model.registry), dict(model.history)
    return trainee
