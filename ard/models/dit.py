"""DiT, the diffusion transformer of arXiv 2212.09748: parameters and numerics of the public release."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ard.models.history import History, TeacherForced
from ard.models.pretrained import Pretrained
from ard_kernels import BlockLayout, adaln, gated_residual_adaln, gelu
from ard_kernels.backends import autocast_dtype

if TYPE_CHECKING:
    from ard.diffusion import Diffusion

TimeFrequencies = Literal["dit", "diffusers"]

_SIZES = {  # depth, width, heads: DiT, table 1
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PRESETS: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": {"depth": depth, "width": width, "heads": heads, "patch_size": patch}
    for size, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
_TIME_FREQUENCIES = 256
_EPS = 1e-6
_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts: float64 it leaves


def is_integer(value: object, least: int = 1) -> bool:
    """Whether it is an int >= least, which True and 2.0 are not."""
    return type(value) is int and value >= least


def check_inputs(where: str, weight: Tensor, shape: tuple[int, ...], inputs: dict[str, Tensor]) -> None:
    """Errors in the name of `where` about the inputs of a network that has this weight.

    The first is (B, *shape), in the dtype of the weight or under autocast; the others, "labels" among them,
    are (B,). All are on the device of the weight. No value is looked at: the host would wait for the GPU.
    """
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {name} is {type(value).__name__}, accepted is a Tensor")
        if value.device != weight.device:
            raise ValueError(
                f"{where}: {name} is on {value.device}, accepted is {weight.device}, where the weights are"
            )
    (name, x), *others = inputs.items()
    if x.dim() != 1 + len(shape) or tuple(x.shape[1:]) != shape:
        raise ValueError(
            f"{where}: {name} has shape {tuple(x.shape)}, accepted is (B, {', '.join(map(str, shape))})"
        )
    if x.dtype != weight.dtype and (autocast_dtype(x.device) is None or x.dtype not in _AUTOCAST):
        raise ValueError(f"{where}: {name} is {x.dtype}, accepted is {weight.dtype} as the weights are, or "
                         f"under autocast {', '.join(map(str, _AUTOCAST))}")  # fmt: skip
    for name, value in others:
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"{where}: {name} has shape {tuple(value.shape)}, accepted is ({len(x)},), one per sample"
            )
    labels = inputs["labels"]
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{where}: labels is {labels.dtype}, accepted are int64 and int32")


def check_labels(where: str, labels: Tensor, num_classes: int) -> None:
    """An error in the name of `where` about labels (B,) that are none of 0..num_classes-1.

    Their values are read, for which the host waits for a GPU. Labels without values are not looked at: on the
    meta device, fake ones, and while torch.compile traces.
    """
    without = labels.is_meta or isinstance(labels, FakeTensor) or torch.compiler.is_compiling()
    if without or not labels.numel():
        return
    low, high = torch.stack(labels.aminmax()).tolist()  # one wait for the GPU, not two
    if not 0 <= low <= high < num_classes:
        raise ValueError(f"{where}: labels are {low}..{high}, accepted are 0..{num_classes - 1}")


def position_embedding(width: int, grid: tuple[int, int]) -> Tensor:
    """(1, h*w, width): sines and cosines, of the column in the first half of the channels, then of the row.

    Frequencies 10000^(-i / (width/4)), as in the public DiT, for any grid.
    """

    def axis(positions: np.ndarray) -> np.ndarray:
        frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    table = np.concatenate([axis(columns.astype(np.float64)), axis(rows.astype(np.float64))], axis=1)
    return torch.tensor(table, dtype=torch.float32).unsqueeze(0)


class TimestepEmbedder(nn.Module):
    """Time in [0, 1000) -> width, through cosines and sines and two linear layers.

    Frequencies 10000^(-i/128) for i < 128, as in the public DiT, or 10000^(-i/127), as in diffusers' DiT.
    """

    def __init__(self, width: int, frequencies: TimeFrequencies = "dit") -> None:
        super().__init__()
        if frequencies not in get_args(TimeFrequencies):
            raise ValueError(f"DiT: time_frequencies is {frequencies!r}, accepted are 'dit', 'diffusers'")
        half = _TIME_FREQUENCIES // 2
        self.divisor = half if frequencies == "dit" else half - 1
        self.mlp = nn.Sequential(nn.Linear(_TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(...,) -> (..., width)."""
        half = _TIME_FREQUENCIES // 2
        frequencies = torch.exp(
            -math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / self.divisor
        )
        angles = t.float().unsqueeze(-1) * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        embedded: Tensor = self.mlp(waves.to(next(self.mlp.parameters()).dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Class label -> width. With a null class, the last row stands for "no class" (for guidance)."""

    def __init__(self, num_classes: int, width: int, null_class: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + null_class, width)

    def forward(self, labels: Tensor, null: bool = True) -> Tensor:
        """labels (...) -> (..., width). Without `null` the null class is as little there as any other number:
        a GPU's kernel asserts it, which costs no wait."""
        if null:
            rows: Tensor = self.embedding_table(labels)
            return rows
        return F.embedding(labels, self.embedding_table.weight[: self.num_classes])


class PatchEmbedder(nn.Module):
    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, L, width)."""
        patches: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return patches


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, Dh) each
        out: Tensor = self.proj(attend(q, k, v).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(gelu(self.fc1(x)))
        return out


class AdaLNModulation(nn.Sequential):
    """Conditioning (B, S, D) -> the (B, S, rows, D) modulation table: shift, scale, and maybe gate."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, rows * width))
        self.rows = rows

    def forward(self, condition: Tensor) -> Tensor:
        activation, linear = self
        table: Tensor = linear(activation(condition)).unflatten(-1, (self.rows, -1))
        return table


class DiTBlock(nn.Module):
    """Attention and MLP, each between a modulated layer norm and a gated residual.

    The modulation rows are shift, scale, gate of attention, then of the MLP, as in the public DiT.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = AdaLNModulation(width, 6)

    def forward(
        self, x: Tensor, y: Tensor, own: Tensor, following: Tensor, layer: int, history: History
    ) -> tuple[Tensor, Tensor]:
        """x is the residual stream (B, T, D), y its modulated norm, `own` (B, S, 6, D) and `following` (B, S,
        >= 2, D) the modulation of this layer and of what comes after it. Returns the new x and its norm for
        what follows."""
        _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = own.unbind(2)
        branch = self.attn(y, partial(history.attend, layer))
        x, y = gated_residual_adaln(x, branch, gate_attn, shift_mlp, scale_mlp, history.layout, _EPS)
        return gated_residual_adaln(
            x, self.mlp(y), gate_mlp, following[:, :, 0], following[:, :, 1], history.layout, _EPS
        )


class FinalLayer(nn.Module):
    """Modulation of the last norm, and the linear layer from tokens to patches."""

    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = AdaLNModulation(width, 2)


def run_layers(
    layers: Sequence[nn.Module] | nn.ModuleList, x: Tensor, tables: Sequence[Tensor], history: History,
    checkpointing: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Residual stream (B, T, D) through all layers.

    Args:
        tables: the modulation of every layer, (B, S, 6, D), and last that of the final norm, (B, S, 2, D).
        checkpointing: keep only what stands between layers and compute the rest again in the backward.

    Returns:
        The final modulated norm, and the residual stream after every layer.
    """
    y = adaln(x, tables[0][:, :, 0], tables[0][:, :, 1], history.layout, _EPS)
    features = []
    for i, layer in enumerate(layers):
        arguments = (x, y, tables[i], tables[i + 1], i, history)
        if checkpointing and torch.is_grad_enabled():
            x, y = checkpoint(layer, *arguments, use_reentrant=False)
        else:
            x, y = layer(*arguments)
        features.append(x)
    return y, features


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, h*w, p*p*C) -> (B, C, h*p, w*p)."""
    x = tokens.unflatten(-1, (patch_size, patch_size, -1)).unflatten(1, grid)  # (B, h, w, p, p, C)
    image: Tensor = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return image


class DiT(nn.Module, Pretrained):
    """A diffusion transformer with adaLN-zero, conditioned on time and class.

    Args:
        input_size: height and width of the input, or one number for both; multiples of patch_size.
        patch_size, channels, width, depth, heads: the architecture; width is a multiple of heads and of 4.
        mlp_ratio: hidden channels of the MLP over width, rounded down to whole channels.
        num_classes: class labels are 0..num_classes-1.
        null_class: a further label, num_classes, means "no class"; guidance needs it.
        learn_sigma: the output has 2*channels channels, the second half for the variance.
        time_frequencies: of the time embedding: "dit" (the public release) or "diffusers" (its DiT differs).

    Raises:
        ValueError: an argument that is none of these; the message names it.

    Attributes:
        diffusion: the process that it was trained for; `from_pretrained` sets it, `save_pretrained` needs it.

    The state dict has the keys and shapes of the public release, whose weights load strictly.

    A subclass may have other layers and embedders, which a student takes over as they are (its own `embed`,
    `modulation` and `features` are its own). It adds its arguments to `config`: it is made again by
    ``cls(**config)``. A folder names its class, and whoever loads it has imported the module that defines it.
    """

    classes: ClassVar[dict[str, type[DiT]]] = {}
    """DiT and its subclasses by name."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        DiT.classes[cls.__name__] = cls

    def __init__(
        self, input_size: int | Sequence[int] = 32, patch_size: int = 2, channels: int = 4, width: int = 1152,
        depth: int = 28, heads: int = 16, mlp_ratio: float = 4.0, num_classes: int = 1000,
        null_class: bool = True, learn_sigma: bool = True, time_frequencies: TimeFrequencies = "dit",
    ) -> None:  # fmt: skip
        super().__init__()
        size = tuple(input_size) if isinstance(input_size, Sequence) else (input_size, input_size)
        if len(size) != 2 or not all(map(is_integer, size)):
            raise ValueError(f"DiT: input_size is {input_size!r}, accepted is an integer >= 1, or height and "
                             "width, two of them")  # fmt: skip
        counts = {"patch_size": patch_size, "channels": channels, "width": width, "depth": depth,
                  "heads": heads, "num_classes": num_classes}  # fmt: skip
        for name, count in counts.items():
            if not is_integer(count):
                raise ValueError(f"DiT: {name} is {count!r}, accepted is an integer >= 1")
        for name, flag in {"null_class": null_class, "learn_sigma": learn_sigma}.items():
            if not isinstance(flag, bool):
                raise ValueError(f"DiT: {name} is {flag!r}, accepted are True and False")
        if size[0] % patch_size or size[1] % patch_size:
            raise ValueError(
                f"DiT: input_size is {size}, accepted are multiples of patch_size ({patch_size})"
            )
        if width % heads or width % 4:
            raise ValueError(f"DiT: width is {width}, accepted are multiples of heads ({heads}) and of 4")
        number = isinstance(mlp_ratio, float) or is_integer(mlp_ratio)
        if not (number and 1 <= width * mlp_ratio < math.inf):
            raise ValueError(f"DiT: mlp_ratio is {mlp_ratio!r}, accepted is a finite number >= 1/{width}, "
                             "one hidden channel")  # fmt: skip
        self.config: dict[str, Any] = {
            "input_size": list(size), "patch_size": patch_size, "channels": channels, "width": width,
            "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio, "num_classes": num_classes,
            "null_class": null_class, "learn_sigma": learn_sigma, "time_frequencies": time_frequencies,
        }  # fmt: skip
        self.input_size, self.patch_size, self.channels = size, patch_size, channels
        self.width, self.depth, self.heads, self.num_classes = width, depth, heads, num_classes
        self.null_class, self.learn_sigma = null_class, learn_sigma
        self.grid = (size[0] // patch_size, size[1] // patch_size)
        self.tokens = self.grid[0] * self.grid[1]
        self.diffusion: Diffusion | None = None

        self.x_embedder = PatchEmbedder(channels, patch_size, width)
        self.t_embedder = TimestepEmbedder(width, time_frequencies)
        self.y_embedder = LabelEmbedder(num_classes, width, null_class)
        self.pos_embed = nn.Parameter(position_embedding(width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size, channels * (1 + learn_sigma))
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, input_size: int | Sequence[int] = 32, **options: Any) -> DiT:
        """One of the published architectures, e.g. "DiT-XL/2"."""
        if name not in PRESETS:
            raise ValueError(f"DiT.from_preset: name is {name!r}, accepted are {', '.join(PRESETS)}")
        return cls(input_size=input_size, **{**PRESETS[name], **options})

    @classmethod
    def _load_folder(cls, folder: Path) -> DiT:
        from ard.checkpoints import load_teacher  # which imports this module

        model = load_teacher(folder)[0]
        if not isinstance(model, cls):
            raise ValueError(f"{folder}: holds a {type(model).__name__}, wanted is a {cls.__name__}")
        return model

    def _save_folder(self, folder: Path) -> None:
        from ard.checkpoints import write_teacher

        if self.diffusion is None:
            raise ValueError("DiT.save_pretrained: diffusion is None, accepted is the Diffusion that the "
                             "teacher was trained for: set model.diffusion")  # fmt: skip
        write_teacher(folder, self, self.diffusion)

    def _initialise(self) -> None:
        """DiT, section 3.2: Xavier for linear layers, and zeros where a layer must start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.width, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)  # type: ignore[arg-type]
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, L, D)."""
        embedded: Tensor = self.x_embedder(x) + self.pos_embed
        return embedded

    def condition(self, t: Tensor, labels: Tensor) -> Tensor:
        """t (B,), labels (B,) -> (B, D), the sum of their embeddings."""
        embedded: Tensor = self.t_embedder(t) + self.y_embedder(labels)
        return embedded

    def modulation(self, condition: Tensor) -> list[Tensor]:
        """condition (B, D) -> the modulation of layers (B, 1, 6, D) and final norm (B, 1, 2, D)."""
        rows = condition.unsqueeze(1)
        return [layer.adaLN_modulation(rows) for layer in (*self.blocks, self.final_layer)]

    def features(self, x: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The prediction of `forward`, and the residual stream (B, L, D) after every layer."""
        tables = self.modulation(condition)
        history = TeacherForced(BlockLayout((self.tokens,)))
        y, features = run_layers(self.blocks, self.embed(x), tables, history)
        return unpatchify(self.final_layer.linear(y), self.grid, self.patch_size), features

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The network's raw prediction.

        Args:
            x: (B, C, h, w), the noisy latent, in the dtype of the weights or under autocast.
            t: (B,), time in [0, 1000); fractions are allowed.
            labels: (B,) int64 or int32 in 0..num_classes (num_classes: no class).

        Returns:
            (B, C or 2C, h, w).

        Raises:
            ValueError: a type, shape, dtype or device that does not fit; the message names it.
        """
        shape = (self.channels, *self.input_size)
        check_inputs("DiT", self.pos_embed, shape, {"x": x, "t": t, "labels": labels})
        if labels.device.type == "cpu":  # on a GPU the host would wait for the values
            check_labels("DiT", labels, self.num_classes + self.null_class)
        return self.features(x, self.condition(t, labels))[0]


DiT.classes["DiT"] = DiT
