"""The model in plain PyTorch: no AnnData, no training loop."""

from .adaptation import Adaptation
from .calibration import Calibration
from .condition import ConditionProcessor, Histology
from .config import ModelConfig
from .decoding import Decoding, Generation
from .head import TokenHead
from .network import TwoStageNetwork, count_parameters
from .observation import Composition, Observation
from .prior import ConditionalMeanPrior
from .quantizer import SharedVectorQuantizer
from .scales import GeneScales, group_genes
from .transformer import GeneVARTransformer
from .two_stage import TwoStageVARST
from .var_stage import VARStage
from .vqvae import MultiScaleDecoder, MultiScaleEncoder, MultiScaleGeneVQVAE, Stage1Losses

__all__ = [
    "Adaptation",
    "Calibration",
    "Composition",
    "ConditionProcessor",
    "ConditionalMeanPrior",
    "Decoding",
    "GeneScales",
    "GeneVARTransformer",
    "Generation",
    "Histology",
    "ModelConfig",
    "MultiScaleDecoder",
    "MultiScaleEncoder",
    "MultiScaleGeneVQVAE",
    "Observation",
    "SharedVectorQuantizer",
    "Stage1Losses",
    "TokenHead",
    "TwoStageNetwork",
    "TwoStageVARST",
    "VARStage",
    "count_parameters",
    "group_genes",
]
