"""What of its history a student has opened: the weights of earlier blocks' keys, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from ard.checkpoints import WEIGHTS, read_tensors
from ard.runs import checkpoints

_NAME = "history_gates.gates"


def weights_over_training(student: Path) -> list[tuple[str, Tensor]]:
    """The weights of `HistoryGates` (N, H, P) of the checkpoints in a student's run, and last its own.

    Args:
        student: its folder.

    Returns:
        By what they are of, "step 600"; the averages, 0 where a gate is closed. Nothing if it has no gates.
    """
    tensors = read_tensors(student / WEIGHTS)
    if _NAME not in tensors:
        return []
    found = []
    for step, folder in checkpoints(student.parent)[:-1]:  # the last one is the student
        average = read_tensors(folder / "ema.safetensors")
        if _NAME in average:  # else the run is another's
            found.append((f"step {step}", average[_NAME].clamp(min=0)))
    return [*found, ("the student", tensors[_NAME].float().clamp(min=0))]


def weights_figure(students: dict[str, list[tuple[str, Tensor]]], most: int = 6) -> Figure:
    """A row of panels a student, over its training: heads of all layers by pairs of blocks. At most so many
    panels, the last ones."""
    shown = {name: some[-most:] for name, some in students.items() if some}
    columns = max(len(some) for some in shown.values())
    figure = Figure(figsize=(2.2 * columns + 1.5, 3.4 * len(shown) + 0.4), layout="constrained")
    panels = figure.subplots(len(shown), columns, squeeze=False)
    top = max(float(gates.max()) for some in shown.values() for _, gates in some) or 1.0
    for row, (name, some) in zip(panels, shown.items(), strict=True):
        for axes in row[len(some) :]:
            axes.set_axis_off()
        for axes, (when, gates) in zip(row, some, strict=False):
            layers, heads, pairs = gates.shape
            image = axes.imshow(gates.flatten(0, 1), vmin=0, vmax=top, cmap="viridis", aspect="auto")
            axes.set_title(when, fontsize=9)
            axes.set_xticks(range(pairs), _pairs(pairs), rotation=90, fontsize=7)
            axes.set_yticks([heads * layer - 0.5 for layer in range(layers)], range(layers), fontsize=7)
            for layer in range(1, layers):
                axes.axhline(heads * layer - 0.5, color="white", linewidth=0.5)
        row[0].set_ylabel(f"{name}\nlayer, its heads", fontsize=8)
        figure.colorbar(image, ax=row, label="weight of a key")
    return figure


def _pairs(count: int) -> Sequence[str]:
    """Names of the pairs of blocks in order, counted from 1."""
    steps = next(s for s in range(2, count + 3) if s * (s - 1) // 2 == count)
    return [f"{i + 1} sees {j + 1}" for i in range(steps) for j in range(i)]
