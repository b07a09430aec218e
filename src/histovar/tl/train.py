"""Both stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from histovar._keys import DEFAULT_KEY
from histovar.anndata_io import gate, slots
from histovar.anndata_io.gate import Data
from histovar.anndata_io.histology import check_embeddings, learn_covariates, stored_niche
from histovar.model import ModelConfig, TwoStageVARST

from .calibrate import LEAST_SPOTS, calibrate
from .train_stage1 import train_stage1
from .train_stage2 import train_stage2


def train(
    data: Data,
    *,
    use_rep: str | Sequence[str],
    layer: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    covariates: Sequence[str] = (),
    config: ModelConfig | None = None,
    key_added: str = DEFAULT_KEY,
    random_state: int = 0,
    table_name: str | None = None,
    stage1: Mapping[str, Any] | None = None,
    stage2: Mapping[str, Any] | None = None,
    **options: Any,
) -> TwoStageVARST:
    """Train stage 1, then stage 2, on the same sections, and calibrate the uncertainty on them (:func:`calibrate`).

    Parameters
    ----------
    data, use_rep, layer, library_key, spatial_key, covariates, config, key_added, random_state, table_name
        As in :func:`train_stage1` and :func:`train_stage2`.
    stage1, stage2
        Training options of one stage alone.
    **options
        Training options of both.

    Returns
    -------
    TwoStageVARST
        The trained model.

    Raises
    ------
    KeyError, ValueError
        As :func:`train_stage1` and :func:`train_stage2`; what stage 2 needs is checked before stage 1 is trained.
    """
    adata = gate.table(data, table_name, genes=True)
    keys = slots.keys(key_added)
    reps = gate.key_list(use_rep)
    check_embeddings(adata, reps)
    gate.coordinates(adata, spatial_key)
    learn_covariates(adata, gate.key_list(covariates, "covariates") if len(covariates) else [])
    names = gate.sections(adata, library_key, spatial_key)
    wanted = ModelConfig.default(2) if config is None else config
    if wanted.n_members:
        gate.check_enough_spots(adata, LEAST_SPOTS, "train and calibrate on (train_stage1 and train_stage2 take fewer)")
    if stored_niche(adata, keys, reps, wanted.n_neighbors, spatial_key, library_key) is None:
        gate.check_neighbors(names, adata.n_obs, wanted.n_neighbors)
    shared: dict[str, Any] = {"library_key": library_key, "key_added": key_added, "random_state": random_state}
    model = train_stage1(adata, layer=layer, config=config, **shared, **{**options, **(stage1 or {})})
    model = train_stage2(
        adata,
        model,
        use_rep=use_rep,
        spatial_key=spatial_key,
        covariates=covariates,
        config=config,
        **shared,
        **{**options, **(stage2 or {})},
    )
    if model.config.n_members:
        calibrate(adata, model, library_key, key_added=key_added, random_state=random_state)
    return model
