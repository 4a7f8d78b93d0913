"""kdq: distil a teacher into a low-bit student, and run it on integer and binary kernels."""

from kdq.blocks import distill_blocks
from kdq.chain import chain_layers_
from kdq.compression import Compressed, CompressionReport, compress
from kdq.configs import Binary, Codebook, Int8Dynamic, Int8Static, Int8WeightOnly, LowBit
from kdq.distill import Distiller, History
from kdq.fold_binary import fold_binary_chain_
from kdq.freeze import freeze_, unfreeze_
from kdq.io import load, save
from kdq.layers import (
    BinaryConv2d,
    BinaryLinear,
    BinaryThresholdLinear,
    CodebookLinear,
    Int8Conv2d,
    Int8Linear,
    LowBitConv2d,
    LowBitLinear,
    QuantizedEmbedding,
)
from kdq.layers.qat_methods import pact_penalty
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
from kdq.observers import KLHistogram, MeanSquaredError, MinMax, MovingAverage, Percentile
from kdq.open_attention import open_attention_
from kdq.phases import Phase, pruning_phases, qkd_phases
from kdq.planning import ConversionReport
from kdq.progressive import lower_precision_
from kdq.prune import prune_
from kdq.ptq import (
    ToolReport,
    correct_bias_,
    equalize_,
    fold_batch_norm_,
    reconstruct_,
    reestimate_batch_norm_,
    smooth_,
)
from kdq.qnn import QuantizeGradient, ShiftAdaMax, ShiftBatchNorm1d, clip_weights_
from kdq.quantize import convert_, prepare_qat_, prepare_switchable_, quantize_
from kdq.reporting import Report, report
from kdq.search import Budget, Plan, Precision, search_precision
from kdq.switch import extract, precision_of, precisions, set_precision_
from kdq.switchable_distill import SwitchableDistiller
from kdq.teacher_cache import CachedTeacher
from kdq.teachers import TeacherEnsemble, self_teacher
from kdq.transfer import transfer_

__all__ = [
    "AttentionTransfer",
    "Binary",
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryThresholdLinear",
    "Budget",
    "CachedTeacher",
    "Codebook",
    "CodebookLinear",
    "Compressed",
    "CompressionReport",
    "ContrastiveKD",
    "ConversionReport",
    "CrossEntropy",
    "DecoupledKD",
    "Distiller",
    "FeatureLoss",
    "Hint",
    "History",
    "Int8Conv2d",
    "Int8Dynamic",
    "Int8Linear",
    "Int8Static",
    "Int8WeightOnly",
    "KLHistogram",
    "LogitRegression",
    "LowBit",
    "LowBitConv2d",
    "LowBitLinear",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "Phase",
    "Plan",
    "Precision",
    "QuantizeGradient",
    "QuantizedEmbedding",
    "RelationalKD",
    "Report",
    "ShiftAdaMax",
    "ShiftBatchNorm1d",
    "SoftTargets",
    "SwitchableDistiller",
    "TeacherEnsemble",
    "ToolReport",
    "Weighted",
    "chain_layers_",
    "clip_weights_",
    "compress",
    "convert_",
    "correct_bias_",
    "distill_blocks",
    "equalize_",
    "extract",
    "fold_batch_norm_",
    "fold_binary_chain_",
    "freeze_",
    "load",
    "lower_precision_",
    "open_attention_",
    "pact_penalty",
    "precision_of",
    "precisions",
    "prepare_qat_",
    "prepare_switchable_",
    "prune_",
    "pruning_phases",
    "qkd_phases",
    "quantize_",
    "reconstruct_",
    "reestimate_batch_norm_",
    "report",
    "save",
    "search_precision",
    "self_teacher",
    "set_precision_",
    "smooth_",
    "transfer_",
    "unfreeze_",
]
