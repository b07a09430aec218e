"""Annotations of arguments that are models with one or both stages trained."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from histovar._arguments import refuse_value
from histovar.model import TwoStageVARST


def _has_stage1(model: TwoStageVARST) -> TwoStageVARST:
    if "genes" not in model.registry:
        refuse_value("a model whose stage 1 is trained, by histovar.tl.train_stage1")
    return model


def _has_both_stages(model: TwoStageVARST) -> TwoStageVARST:
    if model.stage2 is None or "genes" not in model.registry or "use_rep" not in model.registry:
        refuse_value("a model with both stages trained; it has no stage 2 yet, see histovar.tl.train_stage2")
    return model


TrainedStage1 = Annotated[TwoStageVARST, AfterValidator(_has_stage1)]
Trained = Annotated[TwoStageVARST, AfterValidator(_has_both_stages)]
