"""Stage 2: the modules that predict tokens and expression from histology."""

from __future__ import annotations

from torch import nn

from .adaptation import Adaptation
from .calibration import Calibration
from .condition import ConditionProcessor
from .config import ModelConfig
from .head import TokenHead
from .observation import Observation
from .prior import ConditionalMeanPrior
from .transformer import GeneVARTransformer


class VARStage(nn.Module):
    """Stage 2: condition, transformer, token head, prior, observation model, calibration, optionally adaptation.

    Parameters
    ----------
    config
        The model's configuration, with ``embedding_dims``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.condition = ConditionProcessor(config)
        self.transformer = GeneVARTransformer(config)
        self.head = TokenHead(config)
        has_prior = config.n_members > 0
        condition = self.condition
        self.prior = ConditionalMeanPrior(config, condition.views, condition.n_features) if has_prior else None
        self.observation = Observation(config.n_genes)
        self.calibration = Calibration(config.n_genes)
        self.adaptation: Adaptation | None = None

    def add_adaptation(self, n_spots: int) -> Adaptation:
        """Add an untrained :class:`Adaptation` to measured spots of a section.

        Parameters
        ----------
        n_spots
            Number of measured spots in its Gaussian process.
        """
        self.adaptation = Adaptation(n_spots, len(self.observation.base)).to(self.observation.base.device)
        return self.adaptation

    @property
    def of_counts(self) -> bool:
        """Whether the model learnt from counts, so that depth and units can be chosen."""
        return self.prior is not None and self.prior.of_rates

    @property
    def is_calibrated(self) -> bool:
        """Whether uncertainty was calibrated on spots that the prediction had not seen."""
        return bool(self.observation.calibrated) if self.of_counts else self.calibration.fitted
