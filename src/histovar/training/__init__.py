"""Training by Lightning."""

import histovar._torchvision  # noqa: F401  # which lightning imports

from .data import collected, cross_fit_folds, gathered_rows
from .isolation import one_training_at_a_time, seeded
from .options import TrainingOptions
from .resume import checkpoint_directory, lock_directory, refuse_overwriting, resumable, trained_epochs
from .stage1 import Stage1Trainer
from .stage2 import Stage2Trainer
from .survey import Measured

__all__ = [
    "Measured",
    "Stage1Trainer",
    "Stage2Trainer",
    "TrainingOptions",
    "checkpoint_directory",
    "collected",
    "cross_fit_folds",
    "gathered_rows",
    "lock_directory",
    "one_training_at_a_time",
    "refuse_overwriting",
    "resumable",
    "seeded",
    "trained_epochs",
]
