"""Tools: train, calibrate, adapt, tokenise, predict, evaluate, compare with baselines."""

from .adapt import adapt
from .baseline import baseline
from .calibrate import calibrate
from .evaluate import evaluate
from .predict import predict
from .tokenize import tokenize
from .train import train
from .train_stage1 import train_stage1
from .train_stage2 import train_stage2

__all__ = ["adapt", "baseline", "calibrate", "evaluate", "predict", "tokenize", "train", "train_stage1", "train_stage2"]
