"""Learn to speak the tokens from histology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from histovar._keys import DEFAULT_KEY, LOGNORM, Keys
from histovar.anndata_io import read, validate
from histovar.anndata_io.images import scale_factors
from histovar.anndata_io.parts import Part, Parts
from histovar.anndata_io.table import Data, as_table
from histovar.model import ModelConfig, TwoStageVARST
from histovar.training import Measured, Stage2Trainer, seeded


def train_stage2(
    data: Data,
    model: TwoStageVARST,
    *,
    use_rep: str | Sequence[str],
    library_key: str | None = None,
    spatial_key: str = "spatial",
    covariates: Sequence[str] = (),
    config: ModelConfig | None = None,
    key_added: str = DEFAULT_KEY,
    random_state: int = 0,
    table_name: str | None = None,
    **options: Any,
) -> TwoStageVARST:
    """Train stage 2, from histology to gene tokens, on sections with both.

    Parameters
    ----------
    data
        AnnData (or SpatialData) of the training sections, with the panel's genes; in memory, backed, or of dask or zarr
        arrays, which are read section by section, twice, with what is learnt from (some 3 kB a spot) in a temporary
        directory.
    model
        A model with a trained stage 1; it is trained in place.
    use_rep
        Key of ``obsm`` with the embedding of the H&E around each spot; or several, the spot's own first, then wider
        fields.
    library_key
        Column of ``obs`` with the section. Neighbours are sought within it, and one section is held out to watch
        training.
    spatial_key
        Key of ``obsm`` with coordinates, (n_obs, 2).
    covariates
        Columns of ``obs``, categorical or numeric, that join the condition.
    config
        Configuration; the model's own, with the embeddings' widths, by default. Fields of stage 1 must be the model's.
    key_added
        Prefix of the slots.
    random_state
        Seed.
    table_name
        Table of a SpatialData.
    **options
        Further fields of :class:`histovar.training.TrainingOptions`.

    Returns
    -------
    TwoStageVARST
        `model`, trained.

    Raises
    ------
    KeyError
        If a key, a layer or a gene of the panel is missing.
    ValueError
        If embeddings or expression are not finite, a section has fewer spots than neighbours are asked for, or the
        configuration does not fit the model.
    """
    adata = as_table(data, table_name)
    validate.check_object(adata, needs_genes=True)
    reps = validate.check_keys(use_rep)
    layer = model.registry["layer"]
    parts = Parts(adata, library_key, layer, [*reps, spatial_key, Keys(key_added).niche])
    place = validate.coordinates(adata, spatial_key)
    columns = validate.check_genes(adata, model.registry["genes"])
    widths = tuple(read.embedding_width(adata, key) for key in reps)
    encoders = read.learn_covariates(adata, list(covariates))
    wanted = (config or model.config).replace(embedding_dims=widths, n_covariates=read.covariate_width(encoders))
    trainer = Stage2Trainer(model, **options, random_state=random_state)

    def measured(part: Part) -> Measured:
        histology = read.histology(
            part.adata,
            wanted,
            use_rep=reps,
            spatial_key=spatial_key,
            library_key=library_key,
            encoders=encoders,
            key=key_added,
        )
        if layer == LOGNORM:
            read.add_lognorm(part.adata)
        expression = torch.from_numpy(read.expression(part.adata, layer, columns))
        # Of other layers nothing is known of how depth enters them.
        totals = read.total_counts(part.adata) if layer == LOGNORM else None
        return Measured(histology, expression, parts.numbers[part.rows], place[part.rows], totals)

    found = parts.each(measured)
    with seeded(random_state):
        model.add_stage2(wanted)
    model.registry |= {
        "use_rep": reps,
        "embedding_dims": list(widths),
        "spatial_key": spatial_key,
        "library_key": library_key,
        "covariates": encoders,
        "n_spots_stage2": adata.n_obs,
        "sections_stage2": [] if parts.names is None else np.unique(parts.names).tolist(),
        "images": scale_factors(adata.uns.get("spatial")),
    }
    with parts.scratch() as scratch:
        trainer.fit(found, adata.n_obs, scratch)
    return model
