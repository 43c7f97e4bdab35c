"""Tensors as pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ard.checkpoints import replacing
from ard.data import to_uint8


def image_grid(pixels: Tensor, columns: int, gap: int = 2) -> Tensor:
    """(n, C, h, w) in [-1, 1], row by row -> (H, W) uint8; (H, W, 3) of the first 3 channels if C >= 3."""
    images = to_uint8(pixels.detach().cpu())
    channels = 3 if images.shape[1] >= 3 else 1
    images = images[:, :channels]
    rows = -(-len(images) // columns)
    h, w = images.shape[2:]
    canvas = torch.full((channels, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    return canvas[0] if channels == 1 else canvas.permute(1, 2, 0)


def save_png(path: Path, picture: Tensor, zoom: int = 2) -> None:
    """(H, W) or (H, W, 3) uint8, enlarged `zoom` times."""
    image = Image.fromarray(picture.numpy())
    with replacing(path) as temporary:
        image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(
            temporary, "png"
        )
