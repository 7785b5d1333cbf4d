"""TRL's on-policy distillation with the loss of this package: the trainer and its options."""

try:
    from opd_kernels.integrations.trl.config import TopKDistillationConfig
    from opd_kernels.integrations.trl.trainer import TopKDistillationTrainer
except ImportError as error:
    raise ImportError(
        f"{error}: TopKDistillationTrainer needs TRL's DistillationTrainer (checked with 1.16.0); "
        'pip install "opd_kernels[trl]"'
    ) from error

__all__ = ["TopKDistillationConfig", "TopKDistillationTrainer"]
