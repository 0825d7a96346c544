"""The generative model: pure torch, no file access, no runner."""

from mmimpute.model.config import KINDS, ModalityConfig, ModelConfig
from mmimpute.model.imputer import Imputer, Prediction
from mmimpute.model.standardise import FeatureStatistics, Standardise
from mmimpute.model.vae import LossTerms, MultiModalVAE, Predictive

__all__ = [
    "KINDS",
    "FeatureStatistics",
    "Imputer",
    "LossTerms",
    "ModalityConfig",
    "ModelConfig",
    "MultiModalVAE",
    "Prediction",
    "Predictive",
    "Standardise",
]
