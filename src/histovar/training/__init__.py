"""Training of both stages with Lightning."""

import histovar._torchvision  # noqa: F401  # must come before lightning, which imports torchvision

from .data import collect_spots, concat_rows, cross_fit_folds
from .isolation import one_training_at_a_time, seeded
from .options import TrainingOptions
from .resume import checkpoint_directory, lock_directory, refuse_overwriting, resumable, trained_epochs
from .stage1 import Stage1Trainer
from .stage2 import Stage2Trainer
from .statistics import MeasuredSpots

__all__ = [
    "MeasuredSpots",
    "Stage1Trainer",
    "Stage2Trainer",
    "TrainingOptions",
    "checkpoint_directory",
    "collect_spots",
    "concat_rows",
    "cross_fit_folds",
    "lock_directory",
    "one_training_at_a_time",
    "refuse_overwriting",
    "resumable",
    "seeded",
    "trained_epochs",
]
