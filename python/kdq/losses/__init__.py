"""Distillation losses: small objects that a `Distiller` sums and that can be called alone."""

from kdq.losses.features import AttentionTransfer, ContrastiveKD, FeatureLoss, Hint, RelationalKD
from kdq.losses.targets import CrossEntropy, DecoupledKD, LogitRegression, SoftTargets, mean_kl
from kdq.losses.weights import Cosine, Linear, LogitLoss, Loss, Schedule, Step, Weighted

__all__ = [
    "AttentionTransfer",
    "ContrastiveKD",
    "Cosine",
    "CrossEntropy",
    "DecoupledKD",
    "FeatureLoss",
    "Hint",
    "Linear",
    "LogitLoss",
    "LogitRegression",
    "Loss",
    "RelationalKD",
    "Schedule",
    "SoftTargets",
    "Step",
    "Weighted",
    "mean_kl",
]
