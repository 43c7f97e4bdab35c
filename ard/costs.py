"""What a network costs: multiply-accumulates by formula, and as counted by running it on the meta device.

Formula and counter agree exactly. Both hold what `torch.utils.flop_counter` counts (convolutions, linear
layers, attention over visible pairs); elementwise work, norms and softmax are none of it. The column "GFLOPs"
of arXiv 2504.11295 is 10^9 multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ard.checkpoints import write_json
from ard.models import PRESETS, ARDTransformer, DiT
from ard.models.dit import _TIME_FREQUENCIES
from ard.models.history import gate_columns
from ard_kernels import BlockLayout
from ard_kernels.flops import attention_macs
from ard_kernels.layout import Mask


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one pass, by what makes them."""

    patches: int
    """Patch embedding, a convolution."""
    time: int
    """MLP of the time embedding."""
    modulation: int
    """adaLN linear layers, one row per (sample, state)."""
    linear: int
    """qkv, projection and MLP of every token."""
    attention: int
    """q k^T and p v over visible pairs."""
    final: int
    """Linear layers from tokens to patches."""

    @property
    def total(self) -> int:
        return self.patches + self.time + self.modulation + self.linear + self.attention + self.final


def dit_macs(config: dict[str, Any], batch: int = 1) -> Macs:
    """One evaluation of the DiT with this `DiT.config`: every part is proportional to the batch."""
    layout, width = BlockLayout((_tokens(config),)), config["width"]
    channels = config["channels"] * (1 + config["learn_sigma"])
    attention = config["depth"] * attention_macs(layout, "diagonal", width)
    return _macs(config, batch, batch, batch, attention, channels)


def student_macs(config: dict[str, Any], batch: int = 1) -> Macs:
    """One teacher-forced pass of the student with this `ARDTransformer.config`.

    Sampling with the KV cache costs exactly the same: S passes over L tokens make the same rows and pairs as
    one pass over S*L. The time MLP sees the S times once per call, whatever the batch: `time` alone does not
    grow with it, so a sample of a large batch costs up to S (256 D + D^2) less than a batch of one (0.001 %
    for DiT-XL/2).
    """
    teacher, steps, depth = config["teacher"], config["steps"], config["teacher"]["depth"]
    layout, history = BlockLayout.uniform(steps, _tokens(teacher)), config["history_layers"]
    width = teacher["width"]
    if config.get("gated_history") and steps > 1:
        width += teacher["heads"] * gate_columns(width // teacher["heads"], steps)
    attention = history * attention_macs(layout, config["mask"], width)
    attention += (depth - history) * attention_macs(layout, "diagonal", teacher["width"])
    return _macs(teacher, batch, batch * steps, steps, attention, teacher["channels"])


def _tokens(config: dict[str, Any]) -> int:
    height, width = config["input_size"]
    return int(height // config["patch_size"]) * int(width // config["patch_size"])


def _macs(config: dict[str, Any], batch: int, states: int, times: int, attention: int, outputs: int) -> Macs:
    """`states` in all samples together, `times` rows of time embedding, `attention` of a sample's layers."""
    width, depth, pixels = config["width"], config["depth"], config["patch_size"] ** 2
    tokens = states * _tokens(config)
    return Macs(
        patches=tokens * pixels * config["channels"] * width,
        time=times * (_TIME_FREQUENCIES + width) * width,
        modulation=states * (6 * depth + 2) * width * width,
        linear=tokens * depth * (4 * width + 2 * int(width * config["mlp_ratio"])) * width,
        attention=batch * attention,
        final=tokens * width * pixels * outputs,
    )


def count(forward: Callable[[], object]) -> int:
    """Multiply-accumulates of whatever `forward` runs, by torch's counter; on the meta device nothing is
    computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return int(counter.get_total_flops()) // 2


def count_dit(dit: DiT, batch: int = 1) -> int:
    """Multiply-accumulates of one evaluation of the real model (meta device preferred)."""
    x, labels = _inputs(dit, batch)
    return count(lambda: dit(x, labels.float(), labels))


def count_training_pass(student: ARDTransformer, batch: int = 1) -> int:
    """Multiply-accumulates of one teacher-forced forward pass of the real model."""
    x, labels = _inputs(student, batch)
    return count(lambda: student(x.unsqueeze(1).expand(-1, student.steps, -1, -1, -1), labels))


def count_sampling(student: ARDTransformer, batch: int = 1) -> int:
    """Multiply-accumulates of the S passes of sampling with the KV cache."""
    x, labels = _inputs(student, batch)

    def sample() -> None:
        tables, cache = student.modulation(labels), student.cache(batch, x.device)
        state = x
        for s in range(student.steps):
            state = student.step(state, s, tables, cache)

    return count(sample)


def _inputs(model: DiT | ARDTransformer, batch: int) -> tuple[Tensor, Tensor]:
    device = model.pos_embed.device
    x = torch.zeros(batch, model.channels, *model.input_size, device=device)
    return x, torch.zeros(batch, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Published:
    """A row of the published table: DiT-XL/2 at 256 px (arXiv 2504.11295, tables 1 and 2)."""

    name: str
    steps: int
    gmacs: float
    history_layers: int | None = None
    """None: the teacher, evaluated twice a step for guidance. A number: a student."""
    mask: Mask = "causal"


PUBLISHED = (
    Published("DiT-XL/2", 250, 59300),
    Published("teacher", 25, 5930),
    Published("KD", 1, 118.6, 0),
    Published("step distillation", 2, 237.2, 0),
    Published("ARD", 2, 238.1, 6),
    Published("ARD", 2, 241.5, 28),
    Published("step distillation", 4, 474.4, 0),
    Published("ARD", 4, 477.1, 6, "window"),
    Published("ARD", 4, 477.1, 6, "anchor"),
    Published("ARD", 4, 479.9, 6),
    Published("ARD", 4, 500.2, 28),
)


@dataclass(frozen=True)
class Row:
    """One line of the table; costs in 10^9 multiply-accumulates."""

    name: str
    steps: int
    history_layers: int | None
    mask: Mask
    formula: float
    counted: float
    published: float
    deviation_percent: float
    """Of the formula from the published value."""
    overhead_percent: float | None
    """Of history over N = 0 with as many steps; None for a teacher."""


def published_table() -> list[Row]:
    """Every published cost beside our formula's and the real model's."""
    with torch.device("meta"):
        teacher = DiT.from_preset("DiT-XL/2")
    return [_row(teacher, published) for published in PUBLISHED]


def _row(teacher: DiT, published: Published) -> Row:
    overhead: float | None = None
    if published.history_layers is None:
        evaluations = 2 * published.steps
        formula, counted = evaluations * dit_macs(teacher.config).total, evaluations * count_dit(teacher)
    else:
        student = ARDTransformer.from_teacher(
            teacher, published.steps, published.history_layers, published.mask
        )
        formula, counted = student_macs(student.config).total, count_sampling(student)
        overhead = history_overhead(student.config)
    return Row(
        published.name, published.steps, published.history_layers, published.mask, formula / 1e9,
        counted / 1e9, published.gmacs, 100 * (formula / 1e9 / published.gmacs - 1), overhead,
    )  # fmt: skip


def history_overhead(config: dict[str, Any]) -> float:
    """Percent that the history layers add to the same student with N = 0."""
    return 100 * (student_macs(config).total / student_macs({**config, "history_layers": 0}).total - 1)


def format_table(rows: list[Row]) -> str:
    """The table as text, 10^9 multiply-accumulates."""
    head = (
        f"{'model':<18} {'S':>3} {'N':>3} {'mask':<8} {'formula':>10} {'counted':>10} {'published':>10} "
        f"{'deviation':>10} {'history':>9}"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        layers = "-" if row.history_layers is None else str(row.history_layers)
        mask = row.mask if row.history_layers else "-"
        overhead = "-" if row.overhead_percent is None else f"{row.overhead_percent:+.3f} %"
        lines.append(
            f"{row.name:<18} {row.steps:>3} {layers:>3} {mask:<8} {row.formula:>10.2f} {row.counted:>10.2f} "
            f"{row.published:>10.1f} {row.deviation_percent:>+8.3f} % {overhead:>9}"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class FlopsConfig:
    """The cost of a student, and with the defaults the published table beside it."""

    model: str = "DiT-XL/2"
    """Architecture of the teacher and the student: DiT-{S,B,L,XL}/{2,4,8}."""
    input_size: int = 32
    """Height and width of the latent in its own pixels: 32 for images of 256 px."""
    steps: int = 4
    """S, the number of states the student sees."""
    history_layers: int = 6
    """N, how many of the lowest layers see earlier states."""
    mask: Mask = "causal"
    """Which earlier states they see."""
    out: Path | None = None
    """JSON file for everything that is printed."""


def run(config: FlopsConfig) -> None:
    """Print the costs that `config` asks for, and write them to `config.out`."""
    if config.model not in PRESETS:
        raise ValueError(f"model is {config.model!r}, accepted are {', '.join(PRESETS)}")
    rows = published_table() if config == FlopsConfig(out=config.out) else []
    if rows:
        print('10^9 multiply-accumulates a sample, DiT-XL/2 at 256 px (published as "GFLOPs")\n')
        print(format_table(rows), end="\n\n")
    with torch.device("meta"):
        teacher = DiT.from_preset(config.model, config.input_size)
    student = ARDTransformer.from_teacher(teacher, config.steps, config.history_layers, config.mask)
    macs = student_macs(student.config)
    counted = {"training_pass": count_training_pass(student), "sampling": count_sampling(student)}
    overhead = history_overhead(student.config)
    print(f"{config.model}, input {config.input_size}x{config.input_size}, S={config.steps}, "
          f"N={config.history_layers}, {config.mask}: {macs.total / 1e9:.2f} GMAC a sample "
          f"({overhead:+.3f} % for history), in training (forward) and in sampling alike")  # fmt: skip
    for part, value in asdict(macs).items():
        print(f"  {part:<12} {value / 1e9:>10.3f}  {100 * value / macs.total:6.3f} %")
    print(f"counted on the real model: {counted['training_pass'] / 1e9:.2f} in a training pass, "
          f"{counted['sampling'] / 1e9:.2f} in sampling; one evaluation of the teacher "
          f"{dit_macs(teacher.config).total / 1e9:.2f}")  # fmt: skip
    if config.out is not None:
        model = {
            **asdict(config), "out": None, "macs": {**asdict(macs), "total": macs.total}, "counted": counted,
            "overhead_percent": overhead,
        }  # fmt: skip
        write_json(config.out, {"model": model, "published_table": [asdict(row) for row in rows]})
