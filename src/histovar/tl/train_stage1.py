"""Train stage 1: gene tokens from measured expression."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from pydantic import InstanceOf

from histovar._arguments import Key, Seed, check_arguments
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys, Prefix
from histovar._torch_state import in_float32
from histovar._warn_once import warns_once
from histovar.anndata_io import expression, gate, slots
from histovar.anndata_io.gate import Data
from histovar.anndata_io.normalization import SpotTotals, common_normalization
from histovar.anndata_io.sections import Section, Sections
from histovar.model import ModelConfig, TwoStageVARST
from histovar.pp.gene_scales import gene_scales, genes_in_scales
from histovar.training import Stage1Trainer, checkpoint_directory, collect_spots, one_training_at_a_time, seeded

from ._panel import ensure_panel

logger = logging.getLogger(__name__)


@check_arguments
@warns_once
@one_training_at_a_time
@in_float32
def train_stage1(
    data: Data,
    *,
    layer: Key | None = None,
    library_key: Key | None = None,
    group_key: Key | None = None,
    config: InstanceOf[ModelConfig] | None = None,
    key_added: Prefix = DEFAULT_KEY,
    random_state: Seed = 0,
    table_name: Key | None = None,
    **options: Any,
) -> TwoStageVARST:
    """Train stage 1, which learns gene tokens from measured expression; images are not needed.

    Parameters
    ----------
    data
        AnnData or SpatialData of the training sections, in memory, backed, or with dask or zarr arrays, which are read
        section by section into a temporary directory. Panel and scales come from :func:`histovar.pp.gene_panel` and
        :func:`histovar.pp.gene_scales`, which are called with their defaults if you have not called them.
    layer
        Layer with non-negative expression; by default ``layers["lognorm"]``, computed from the counts in ``X`` if
        absent. ``"X"`` is ``X`` itself.
    library_key
        Column of ``obs`` with the section; one section is held out for validation (early stopping).
    config
        Configuration; by default :meth:`histovar.model.ModelConfig.default` for the panel. It sets the number of genes
        and the scales if these have not been chosen yet.
    group_key
        Column of ``obs`` with the individual (patient, animal) of each section. Of three or more individuals, one is
        held out for validation instead of a section.
    key_added
        Prefix of the slots of panel and scales.
    random_state
        Seed.
    table_name
        Table of a SpatialData.
    **options
        Further fields of :class:`histovar.training.TrainingOptions`, such as ``max_epochs``, ``batch_size`` or
        ``accelerator``. With ``checkpoint_dir``, interrupted training continues with ``resume_from`` set to the same
        directory.

    Returns
    -------
    TwoStageVARST
        A model with a trained stage 1 and no stage 2.

    Raises
    ------
    KeyError
        If a key is missing.
    ValueError
        If expression is negative or not finite; if counts are needed and missing; if `config` does not fit an existing
        panel or existing scales; if an option is out of range; or if ``checkpoint_dir`` has checkpoints of another
        training.
    TypeError
        If an option is unknown or of another type.
    FloatingPointError
        If training diverges.
    """
    trainer_options = {**options, "random_state": random_state}
    checked = Stage1Trainer.checked_options(trainer_options)
    random_state = checked.random_state
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key_added)
    trained_layer = LOGNORM if layer is None else layer
    sections = Sections(adata, library_key, trained_layer)
    individuals = gate.groups(adata, group_key, sections.names)
    gate.check_enough_spots(adata, 10, "train on")
    expression.check_layer(adata, layer)
    stage1_config = _checked_config(adata, keys, config)
    with checkpoint_directory(checked), slots.writing(adata):
        _prepare(adata, keys, layer, stage1_config, random_state)
        genes = adata.var_names[gate.panel(adata, keys)].tolist()
        columns = gate.gene_columns(adata, genes)
        groups = np.asarray(adata.varm[keys.scales])[columns].T.astype(np.int64)
        if stage1_config is None:
            scales = tuple(int(level.max()) + 1 for level in groups)
            stage1_config = ModelConfig.default(len(genes))
            if scales != stage1_config.scales:
                stage1_config = _config_for(scales)
        with seeded(random_state):
            model = TwoStageVARST(stage1_config)
        model.registry = {
            "genes": genes,
            "layer": trained_layer,
            "library_key": library_key,
            "n_spots_stage1": adata.n_obs,
            "sections_stage1": [] if sections.names is None else np.unique(sections.names).tolist(),
        }
        totals: dict[str, SpotTotals] = {}

        def measured(section: Section) -> tuple[torch.Tensor]:
            names = None if sections.names is None else sections.names[section.rows]
            values, section_totals = expression.expression(section.adata, trained_layer, columns, sections=names)
            totals.update(section_totals)
            return (torch.from_numpy(values),)

        with sections.scratch() as scratch:
            spots = collect_spots(sections.map(measured), adata.n_obs, scratch)
            normalization = common_normalization(totals, trained_layer, adata.n_vars, len(columns))
            model.registry |= {
                "units": expression.units(trained_layer, normalization),
                "normalization": normalization.plain(),
            }
            order = sections.order
            ordered_individuals = None if individuals is None else individuals[order]
            Stage1Trainer(model, **trainer_options).fit(spots, groups, sections.numbers[order], ordered_individuals)
    return model


def _prepare(adata: AnnData, keys: Keys, layer: str | None, config: ModelConfig | None, random_state: int) -> None:
    """Call the `pp` functions that the user has skipped, with the sizes of the configuration if there is one."""
    ensure_panel(adata, keys, None if config is None else config.n_genes)
    if layer is None:
        expression.add_lognorm(adata)
    if keys.scales in adata.varm and _of_another_panel(adata, keys):
        slots.drop(adata, keys, [("varm", keys.scales)], ["scales", "scales_by"])
        logger.info("varm[%r] belongs to another panel: computed again", keys.scales)
    if keys.scales not in adata.varm:
        arguments: dict[str, Any] = {} if config is None else {"scales": config.scales[:-1]}
        logger.info("no varm[%r]: calling histovar.pp.gene_scales(adata)", keys.scales)
        gene_scales(adata, **arguments, layer=layer, key_added=keys.prefix, random_state=random_state)


def _checked_config(adata: AnnData, keys: Keys, config: ModelConfig | None) -> ModelConfig | None:
    """Configuration of stage 1; refused if it does not fit an existing panel or existing scales."""
    if config is None:
        return None
    if keys.panel in adata.var and config.n_genes != (n_panel := int(gate.panel(adata, keys).sum())):
        raise ValueError(
            f"config: made for {config.n_genes} genes, but the panel has {n_panel}; call "
            f"histovar.pp.gene_panel(adata, n_genes={config.n_genes}) or make a configuration for {n_panel}"
        )
    if keys.scales in adata.varm and not _of_another_panel(adata, keys):
        scales = tuple(int(n) for n in np.asarray(adata.varm[keys.scales]).max(0) + 1)
        if scales != config.scales:
            raise ValueError(
                f"config: made for scales {config.scales}, but varm[{keys.scales!r}] has {scales}; call "
                f"histovar.pp.gene_scales(adata, scales={config.scales[:-1]}) or make a configuration for these"
            )
    return config.replace(embedding_dims=())


def _of_another_panel(adata: AnnData, keys: Keys) -> bool:
    """True if the scales belong to another panel, because it was chosen again.

    Raises
    ------
    ValueError
        If they were made from gene sets, which are not known here.
    """
    if keys.panel in adata.var and np.array_equal(genes_in_scales(adata, keys), gate.panel(adata, keys)):
        return False
    if slots.record(adata, keys).get("scales_by") == "gene sets":
        raise ValueError(
            f"adata: varm[{keys.scales!r}] has the gene sets of another panel; call histovar.pp.gene_scales(adata, "
            "gene_sets=...) again"
        )
    return True


def _config_for(scales: tuple[int, ...]) -> ModelConfig:
    """Default configuration for other scales; groups of coarser scales get more components."""
    n = len(scales)
    components = tuple(max(1, 4 // 2**k) if k < n - 1 else 1 for k in range(n))
    hidden = tuple(256 if k == n - 1 else 96 for k in range(n))
    return ModelConfig(n_genes=scales[-1], scales=scales, components=components, encoder_hidden=hidden)
