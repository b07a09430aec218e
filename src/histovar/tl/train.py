"""Train both stages of a model and calibrate it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import InstanceOf

from histovar._arguments import Key, KeyList, KeyOrKeys, PathLike, Seed, check_arguments
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar._warn_once import warns_once
from histovar.anndata_io import gate, slots
from histovar.anndata_io.gate import Data
from histovar.anndata_io.histology import check_embeddings, learn_covariates, stored_niche
from histovar.model import ModelConfig, TwoStageVARST
from histovar.training import (
    Stage1Trainer,
    Stage2Trainer,
    TrainingOptions,
    lock_directory,
    one_training_at_a_time,
    refuse_overwriting,
    resumable,
    trained_epochs,
)

from .calibrate import LEAST_SPOTS, calibrate
from .train_stage1 import train_stage1
from .train_stage2 import train_stage2

# Options of the whole training, which one stage cannot have.
OF_BOTH_STAGES = ("random_state", "checkpoint_dir", "resume", "resume_from")


@check_arguments
@warns_once
@one_training_at_a_time
def train(
    data: Data,
    *,
    use_rep: KeyOrKeys,
    layer: Key | None = None,
    library_key: Key | None = None,
    group_key: Key | None = None,
    spatial_key: Key = "spatial",
    covariates: KeyList = (),
    config: InstanceOf[ModelConfig] | None = None,
    key_added: Prefix = DEFAULT_KEY,
    random_state: Seed = 0,
    table_name: Key | None = None,
    stage1: Mapping[str, Any] | None = None,
    stage2: Mapping[str, Any] | None = None,
    checkpoint_dir: PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> TwoStageVARST:
    """Train both stages of a model on the same sections, and calibrate its uncertainty on them.

    Parameters
    ----------
    data, use_rep, layer, library_key, group_key, spatial_key, covariates, config, key_added, random_state, table_name
        As in :func:`train_stage1` and :func:`train_stage2`.
    stage1, stage2
        Training options of only one stage.
    checkpoint_dir
        Directory for checkpoints, with subdirectories ``stage1`` and ``stage2``; None keeps none. One that already has
        checkpoints is refused without `resume`.
    resume
        Continue an interrupted training, by the same call, to the same result: at most one epoch is lost, and finished
        stages are not trained again. Without checkpoints, training starts from the beginning. Data, configuration and
        options must be those of the interrupted call, except that ``max_epochs`` may be raised, for stage 1 only until
        stage 2 has begun.
    **options
        Training options of both stages, see :class:`histovar.training.TrainingOptions`.

    Returns
    -------
    TwoStageVARST
        The trained model.

    Raises
    ------
    KeyError, TypeError, ValueError, FloatingPointError
        As :func:`train_stage1` and :func:`train_stage2`; inputs of stage 2 are checked before stage 1 is trained.
    """
    common = {**options, "random_state": random_state, "checkpoint_dir": checkpoint_dir}
    whole_options = _check_shared_options(common, resume)
    options_of_stages = [
        _options_of_stage(stage, whole_options, common, own) for stage, own in ((1, stage1), (2, stage2))
    ]
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key_added)
    reps = list(use_rep)  # a single key has become a list
    check_embeddings(adata, reps)
    gate.coordinates(adata, spatial_key)
    learn_covariates(adata, covariates)
    names = gate.sections(adata, library_key, spatial_key)
    effective_config = ModelConfig.default(2) if config is None else config
    if effective_config.n_members:
        gate.check_enough_spots(adata, LEAST_SPOTS, "train and calibrate on (train_stage1 and train_stage2 take fewer)")
    if stored_niche(adata, keys, reps, effective_config.n_neighbors, spatial_key, library_key) is None:
        gate.check_neighbors(names, adata.n_obs, effective_config.n_neighbors)
    gate.groups(adata, group_key, names)
    shared: dict[str, Any] = {"library_key": library_key, "group_key": group_key, "key_added": key_added}
    with lock_directory(whole_options), slots.writing(adata):
        stage1_options, stage2_options = _with_resume(options_of_stages, resume)
        model = train_stage1(adata, layer=layer, config=config, **shared, **stage1_options)
        model = train_stage2(
            adata,
            model,
            use_rep=use_rep,
            spatial_key=spatial_key,
            covariates=covariates,
            config=config,
            **shared,
            **stage2_options,
        )
        if model.config.n_members:
            device = "cpu" if whole_options.resolved_accelerator() == "cpu" else "auto"
            calibrate(
                adata, model, library_key, key_added=key_added, device=device, random_state=whole_options.random_state
            )
    return model


def _check_shared_options(common: Mapping[str, Any], resume: bool) -> TrainingOptions:
    """Check the options of both stages."""
    if "resume_from" in common:
        raise ValueError("resume_from: is for a single stage; to resume both use checkpoint_dir=..., resume=True")
    whole = Stage1Trainer.checked_options(dict(common))
    if resume and whole.checkpoint_dir is None:
        raise ValueError("resume: checkpoint_dir is missing, the directory of the training to continue")
    return whole


def _options_of_stage(
    stage: int, whole: TrainingOptions, common: Mapping[str, Any], own: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Check and combine the options of one stage."""
    if misplaced := [name for name in OF_BOTH_STAGES if name in (own or {})]:
        raise ValueError(f"stage{stage}: {misplaced} apply to both stages; pass them to train itself")
    directory = None if whole.checkpoint_dir is None else Path(whole.checkpoint_dir) / f"stage{stage}"
    options = {**common, **(own or {}), "checkpoint_dir": directory}
    try:
        (Stage1Trainer if stage == 1 else Stage2Trainer).checked_options(options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"stage{stage}: {error}") from None
    return options


def _with_resume(options_of_stages: list[dict[str, Any]], resume: bool) -> list[dict[str, Any]]:
    """Add the checkpoints to continue from to the options of the stages."""
    if not resume:
        for options in options_of_stages:
            if options["checkpoint_dir"] is not None:
                refuse_overwriting(options["checkpoint_dir"])
        return options_of_stages
    directories = [options["checkpoint_dir"] for options in options_of_stages]
    resume_options = [{"resume_from": d} if resumable(d) else {} for d in directories]
    if resume_options[1] and resume_options[0]:
        # Stage 2 has learnt the tokens of stage 1 as it is, which must not be trained any further.
        resume_options[0]["max_epochs"] = trained_epochs(directories[0]) or options_of_stages[0].get("max_epochs")
    return [{**options, **more} for options, more in zip(options_of_stages, resume_options, strict=True)]
