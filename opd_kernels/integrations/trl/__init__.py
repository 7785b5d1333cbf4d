"""TRL's on-policy distillation with the loss of this package: the trainer and its options."""

from opd_kernels.integrations.trl.config import TopKDistillationConfig
from opd_kernels.integrations.trl.trainer import TopKDistillationTrainer

__all__ = ["TopKDistillationConfig", "TopKDistillationTrainer"]
