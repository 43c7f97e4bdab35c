"""ARD, AutoRegressive Distillation of diffusion transformers (arXiv 2504.11295): models, trainer and
sampler."""

from ard.sampling import sample

__all__ = ["sample"]
