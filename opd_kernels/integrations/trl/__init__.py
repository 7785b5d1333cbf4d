"""TRL with the losses of this package: a trainer and its options, and hooks for others."""

from opd_kernels.integrations.trl.config import TopKDistillationConfig
from opd_kernels.integrations.trl.hooks import (
    topk_jsd_loss,
    topk_self_distillation_loss,
    use_topk_loss,
)
from opd_kernels.integrations.trl.trainer import TopKDistillationTrainer

__all__ = [
    "TopKDistillationConfig",
    "TopKDistillationTrainer",
    "topk_jsd_loss",
    "topk_self_distillation_loss",
    "use_topk_loss",
]
