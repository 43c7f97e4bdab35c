"""Backbones: the DiT teacher and the ARD student made from it."""

from ard.models.dit import PRESETS, DiT
from ard.models.student import ARDTransformer

__all__ = ["PRESETS", "ARDTransformer", "DiT"]
