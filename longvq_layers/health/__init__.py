"""Is the training healthy? Readings of codebooks, attention entropy, gates and gradients, and what to change."""

from longvq_layers.health.codebooks import CodebookRow, CodebookTable, codebook_statistics
from longvq_layers.health.diagnosis import Diagnosis, Finding, diagnose
from longvq_layers.health.entropy import attention_entropy
from longvq_layers.health.gradients import GradientRow, GradientTable, gradient_scales
from longvq_layers.health.log import log_row
from longvq_layers.health.monitor import Monitor
from longvq_layers.health.thresholds import THRESHOLDS

__all__ = [
    "THRESHOLDS",
    "CodebookRow",
    "CodebookTable",
    "Diagnosis",
    "Finding",
    "GradientRow",
    "GradientTable",
    "Monitor",
    "attention_entropy",
    "codebook_statistics",
    "diagnose",
    "gradient_scales",
    "log_row",
]
