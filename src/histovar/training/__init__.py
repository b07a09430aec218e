"""Training by Lightning."""

from .data import cross_fit_folds, section_numbers
from .stage1 import Stage1Trainer
from .stage2 import Stage2Trainer
from .trainer import TrainingOptions, seeded

__all__ = ["Stage1Trainer", "Stage2Trainer", "TrainingOptions", "cross_fit_folds", "section_numbers", "seeded"]
