"""kdq: distil a teacher into a low-bit student, and run it on integer and binary kernels."""

from kdq.configs import Binary, Int8Dynamic, Int8Static, Int8WeightOnly, LowBit
from kdq.distill import Distiller, History
from kdq.io import load, save
from kdq.layers import BinaryLinear, Int8Linear, LowBitLinear
from kdq.losses import (
    AttentionTransfer,
    ContrastiveKD,
    CrossEntropy,
    DecoupledKD,
    FeatureLoss,
    Hint,
    LogitRegression,
    RelationalKD,
    SoftTargets,
    Weighted,
)
from kdq.phases import Phase, qkd_phases
from kdq.progressive import lower_precision_
from kdq.quantize import ConversionReport, convert_, prepare_qat_, quantize_
from kdq.reporting import Report, report
from kdq.teacher_cache import CachedTeacher
from kdq.teachers import TeacherEnsemble, self_teacher

__all__ = [
    "AttentionTransfer",
    "Binary",
    "BinaryLinear",
    "CachedTeacher",
    "ContrastiveKD",
    "ConversionReport",
    "CrossEntropy",
    "DecoupledKD",
    "Distiller",
    "FeatureLoss",
    "Hint",
    "History",
    "Int8Dynamic",
    "Int8Linear",
    "Int8Static",
    "Int8WeightOnly",
    "LogitRegression",
    "LowBit",
    "LowBitLinear",
    "Phase",
    "RelationalKD",
    "Report",
    "SoftTargets",
    "TeacherEnsemble",
    "Weighted",
    "convert_",
    "load",
    "lower_precision_",
    "prepare_qat_",
    "qkd_phases",
    "quantize_",
    "report",
    "save",
    "self_teacher",
]
