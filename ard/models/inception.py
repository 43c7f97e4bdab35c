"""Inception v3 as it was published for TensorFlow on 5 December 2015: the network of FID, sFID and IS.

Graph: classify_image_graph_def.pb of inception-2015-12-05.tgz. Parameters have the names of the public
conversion (pt_inception-2015-12-05-6726825d.pth of pytorch-fid and torch-fidelity), which counts blocks as
torchvision does: TensorFlow's mixed ... mixed_10 are Mixed_5b ... Mixed_7c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 1008
FEATURES = 2048
SPATIAL = 2023  # 17 x 17 positions of 7 channels: about as many numbers as there are features
_SIZE = 299
_SPATIAL_CHANNELS = 7  # Nash et al., arXiv 2103.03841, section 5.2


class _Layer(NamedTuple):
    name: str
    outputs: int
    size: int | tuple[int, int]
    stride: int = 1


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU; with stride 1 the image keeps its size."""

    def __init__(self, inputs: int, layer: _Layer) -> None:
        super().__init__()
        padding: str | int = "same" if layer.stride == 1 else 0
        self.conv = nn.Conv2d(inputs, layer.outputs, layer.size, layer.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    # TensorFlow divides by the number of pixels inside the image.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": _average,
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}

# A branch applies its steps in turn: a pool, or convolutions of the same input whose results are joined.
_Branch = list[str | list[_Layer]]


class _Mixed(nn.Module):
    """Branches of the same input; their results are joined along the channels."""

    def __init__(self, inputs: int, branches: list[_Branch]) -> None:
        super().__init__()
        self._branches = branches
        for branch in branches:
            width = inputs
            for step in branch:
                if not isinstance(step, str):
                    for layer in step:
                        self.add_module(layer.name, _Conv(width, layer))
                    width = sum(layer.outputs for layer in step)

    def _run(self, branch: _Branch, x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _POOLS[step](x)
            else:
                x = torch.cat([self.get_submodule(layer.name)(x) for layer in step], 1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self._branches], 1)


def _chain(name: str, *layers: tuple[int, int | tuple[int, int]], last_stride: int = 1) -> _Branch:
    """Convolutions one after the other, called name_1, name_2, ..."""
    steps: _Branch = []
    for i, (outputs, size) in enumerate(layers, 1):
        stride = last_stride if i == len(layers) else 1
        steps.append([_Layer(f"{name}_{i}", outputs, size, stride)])
    return steps


def _pooled(pool: str, outputs: int) -> _Branch:
    return [pool, [_Layer("branch_pool", outputs, 1)]]


def _block_35(inputs: int, pooled: int) -> _Mixed:
    """On 35 x 35 pixels."""
    return _Mixed(inputs, [
        [[_Layer("branch1x1", 64, 1)]],
        _chain("branch5x5", (48, 1), (64, 5)),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        _pooled("average", pooled),
    ])  # fmt: skip


def _block_17(width: int) -> _Mixed:
    """On 17 x 17 pixels, 768 channels."""
    across, down = (1, 7), (7, 1)
    return _Mixed(768, [
        [[_Layer("branch1x1", 192, 1)]],
        _chain("branch7x7", (width, 1), (width, across), (192, down)),
        _chain("branch7x7dbl", (width, 1), (width, down), (width, across), (width, down), (192, across)),
        _pooled("average", 192),
    ])  # fmt: skip


def _block_8(inputs: int, pool: str) -> _Mixed:
    """On 8 x 8 pixels."""

    def both(name: str) -> list[_Layer]:
        return [_Layer(f"{name}a", 384, (1, 3)), _Layer(f"{name}b", 384, (3, 1))]

    return _Mixed(inputs, [
        [[_Layer("branch1x1", 320, 1)]],
        [*_chain("branch3x3", (384, 1)), both("branch3x3_2")],
        [*_chain("branch3x3dbl", (448, 1), (384, 3)), both("branch3x3dbl_3")],
        _pooled(pool, 192),
    ])  # fmt: skip


def resize(images: Tensor, size: int = _SIZE) -> Tensor:
    """Bilinear resize of TensorFlow 1: pixel i of the result lies at i * (old size / new size) of the old
    image.

    Args:
        images: (n, C, h, w), floating point.

    Returns:
        (n, C, size, size).
    """
    for axis in (3, 2):
        old = images.shape[axis]
        at = torch.arange(size, dtype=torch.float32, device=images.device)
        at = at * torch.tensor(old / size, dtype=torch.float32)  # rounded to float32, as the graph does
        low = at.long()
        weight = (at - low).to(images.dtype).view(-1, *[1] * (3 - axis))
        first = images.index_select(axis, low)
        images = first + (images.index_select(axis, (low + 1).clamp_max(old - 1)) - first) * weight
    return images


class Inception(nn.Module):
    """Features of images. Inference only; float32 unless converted."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _unpadded(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _unpadded(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, _Layer("", 64, 3))
        self.Conv2d_3b_1x1 = _Conv(64, _Layer("", 80, 1))
        self.Conv2d_4a_3x3 = _unpadded(80, 192, 3)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = _Mixed(288, [
            [[_Layer("branch3x3", 384, 3, 2)]],
            _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3), last_stride=2),
            ["halve"],
        ])  # fmt: skip
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        self.Mixed_7a = _Mixed(768, [
            _chain("branch3x3", (192, 1), (320, 3), last_stride=2),
            _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3), last_stride=2),
            ["halve"],
        ])  # fmt: skip
        self.Mixed_7b = _block_8(1280, "average")
        self.Mixed_7c = _block_8(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled and spatial features.

        Args:
            images: (n, 3, h, w) uint8, of any size.

        Returns:
            (n, 2048), TensorFlow's `pool_3`; and (n, 2023), the first 7 channels of `mixed_6/conv` after its
            ReLU, channels last.
        """
        x = (resize(images.to(self.fc.weight.dtype)) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # of its first branch, mixed_6/conv
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean((2, 3)), spatial


def _unpadded(inputs: int, outputs: int, size: int, stride: int = 1) -> _Conv:
    """TensorFlow's VALID convolutions of the stem."""
    layer = _Conv(inputs, _Layer("", outputs, size, stride))
    layer.conv.padding = (0, 0)
    return layer
