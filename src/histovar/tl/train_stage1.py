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
        AnnData or SpatialData of the training sections, in memory, backed, or of dask or zarr arrays, which are read
        section by section; what is learnt from is then kept in a temporary directory. Its panel and scales are those of
        :func:`histovar.pp.gene_panel` and :func:`histovar.pp.gene_scales`, which are called with their defaults where
        they have not been.
    layer
        Layer with expression, not negative; ``layers["lognorm"]`` by default, made from the counts in ``X`` if absent.
        ``"X"`` is ``X`` itself.
    library_key
        Column of ``obs`` with the section; one section is held out to watch training.
    config
        Configuration; :meth:`histovar.model.ModelConfig.default` for the panel by default. It decides the number of
        genes and the scales where they have not been chosen yet.
    group_key
        Column of ``obs`` with the individual (patient, animal), of whom a section is of one. Of three or more, one is
        held out to watch training in place of a section.
    key_added
        Prefix of the slots of panel and scales.
    random_state
        Seed.
    table_name
        Table of a SpatialData.
    **options
        Further fields of :class:`histovar.training.TrainingOptions`, such as ``max_epochs``, ``batch_size`` or
        ``accelerator``. With ``checkpoint_dir``, training that was interrupted continues by ``resume_from`` with the
        same directory.

    Returns
    -------
    TwoStageVARST
        The model, with a trained stage 1 and no stage 2.

    Raises
    ------
    KeyError
        If a key is missing.
    ValueError
        If expression is negative or not finite, if there are no counts where they are needed, or if `config` is
        not for the panel, or the scales, that are there; if an option is out of range, or if ``checkpoint_dir`` has
        checkpoints of another training.
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
    wanted = LOGNORM if layer is None else layer
    sections = Sections(adata, library_key, wanted)
    individuals = gate.groups(adata, group_key, sections.names)
    gate.check_enough_spots(adata, 10, "train on")
    expression.check_layer(adata, layer)
    model_of_panel = _checked_config(adata, keys, config)
    with checkpoint_directory(checked), slots.writing(adata):
        _prepare(adata, keys, layer, model_of_panel, random_state)
        genes = adata.var_names[gate.panel(adata, keys)].tolist()
        columns = gate.gene_columns(adata, genes)
        groups = np.asarray(adata.varm[keys.scales])[columns].T.astype(np.int64)
        if model_of_panel is None:
            scales = tuple(int(level.max()) + 1 for level in groups)
            model_of_panel = ModelConfig.default(len(genes))
            if scales != model_of_panel.scales:
                model_of_panel = _config_for(scales)
        with seeded(random_state):
            model = TwoStageVARST(model_of_panel)
        model.registry = {
            "genes": genes,
            "layer": wanted,
            "library_key": library_key,
            "n_spots_stage1": adata.n_obs,
            "sections_stage1": [] if sections.names is None else np.unique(sections.names).tolist(),
        }
        totals: dict[str, SpotTotals] = {}

        def measured(section: Section) -> tuple[torch.Tensor]:
            names = None if sections.names is None else sections.names[section.rows]
            values, of_sections = expression.expression(section.adata, wanted, columns, sections=names)
            totals.update(of_sections)
            return (torch.from_numpy(values),)

        with sections.scratch() as scratch:
            spots = collect_spots(sections.map(measured), adata.n_obs, scratch)
            normalization = common_normalization(totals, wanted, adata.n_vars, len(columns))
            model.registry |= {
                "units": expression.units(wanted, normalization),
                "normalization": normalization.plain(),
            }
            order = sections.order
            watched = None if individuals is None else individuals[order]
            Stage1Trainer(model, **trainer_options).fit(spots, groups, sections.numbers[order], watched)
    return model


def _prepare(adata: AnnData, keys: Keys, layer: str | None, config: ModelConfig | None, random_state: int) -> None:
    """Call the `pp` functions that the user has skipped, for the configuration where there is one."""
    ensure_panel(adata, keys, None if config is None else config.n_genes)
    if layer is None:
        expression.add_lognorm(adata)
    if keys.scales in adata.varm and _of_another_panel(adata, keys):
        slots.drop(adata, keys, [("varm", keys.scales)], ["scales", "scales_by"])
        logger.info("varm[%r] is of another panel: made again", keys.scales)
    if keys.scales not in adata.varm:
        wanted: dict[str, Any] = {} if config is None else {"scales": config.scales[:-1]}
        logger.info("no varm[%r]: calling histovar.pp.gene_scales(adata)", keys.scales)
        gene_scales(adata, **wanted, layer=layer, key_added=keys.prefix, random_state=random_state)


def _checked_config(adata: AnnData, keys: Keys, config: ModelConfig | None) -> ModelConfig | None:
    """The configuration of stage 1, refused if panel or scales that are there already are others."""
    if config is None:
        return None
    if keys.panel in adata.var and config.n_genes != (n_panel := int(gate.panel(adata, keys).sum())):
        raise ValueError(
            f"config: made for {config.n_genes} genes, the panel has {n_panel}; call histovar.pp.gene_panel(adata, "
            f"n_genes={config.n_genes}) or make the configuration for {n_panel}"
        )
    if keys.scales in adata.varm and not _of_another_panel(adata, keys):
        scales = tuple(int(n) for n in np.asarray(adata.varm[keys.scales]).max(0) + 1)
        if scales != config.scales:
            raise ValueError(
                f"config: made for scales {config.scales}, varm[{keys.scales!r}] has {scales}; call "
                f"histovar.pp.gene_scales(adata, scales={config.scales[:-1]}) or make the configuration for them"
            )
    return config.replace(embedding_dims=())


def _of_another_panel(adata: AnnData, keys: Keys) -> bool:
    """Whether the scales are not those of the panel, which was chosen anew.

    Raises
    ------
    ValueError
        If so, and they are of gene sets, which are not known here.
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
    """The default configuration with other numbers of groups: coarser groups get more components."""
    n = len(scales)
    components = tuple(max(1, 4 // 2**k) if k < n - 1 else 1 for k in range(n))
    hidden = tuple(256 if k == n - 1 else 96 for k in range(n))
    return ModelConfig(n_genes=scales[-1], scales=scales, components=components, encoder_hidden=hidden)
