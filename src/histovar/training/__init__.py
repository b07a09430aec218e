"""Training by Lightning."""

from .data import collected, cross_fit_folds, gathered_rows
from .stage1 import Stage1Trainer
from .stage2 import Stage2Trainer
from .survey import Measured
from .trainer import TrainingOptions, seeded

__all__ = [
    "Measured",
    "Stage1Trainer",
    "Stage2Trainer",
    "TrainingOptions",
    "collected",
    "cross_fit_folds",
    "gathered_rows",
    "seeded",
]
