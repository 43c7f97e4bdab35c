"""What the demo's report is made of: its table, its pictures, its page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ard.data import CLASSES
from ard.pictures import image_grid
from ard.runs import read_log


def _summary(result: dict[str, Any]) -> str:
    teacher, *students = result["rows"]
    excess = ", ".join(
        f"{row['name']} {row['frechet'] - teacher['frechet']:.1f}"
        + (f" ({row['training_seconds']:.0f} s)" if row["training_seconds"] else "")
        for row in students
    )
    return (
        f"{result['iterations']} iterations each, seed {result['seed']}, "
        f"{teacher['samples']} held-out samples; Frechet distance in the features of: {result['features']}. "
        f"Excess over the teacher (and training time): {excess}."
    )


_COLUMNS = ("", "Frechet", "precision", "recall", "MMAC", "ms/sample", "error per step")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['frechet']:.2f}",
        f"{row['precision']:.3f}",
        f"{row['recall']:.3f}",
        f"{row['mmac']:.1f}",
        f"{row['ms_per_sample']:.2f}",
        " ".join(f"{e:.4f}" for e in row["errors"]),
    )


def table(result: dict[str, Any]) -> str:
    columns = list(zip(_COLUMNS, *(_cells(row) for row in result["rows"]), strict=True))
    padded = []
    for i, cells in enumerate(columns):
        width = max(map(len, cells))
        padded.append([cell.ljust(width) if i == 0 else cell.rjust(width) for cell in cells])
    body = "\n".join("  ".join(line) for line in zip(*padded, strict=True))
    return f"\n{body}\n{_summary(result)}"


def rows_caption(paths: dict[str, Tensor], labels: Tensor) -> str:
    classes = ", ".join(CLASSES["fashion-mnist"])
    return f"Rows: teacher, 25 steps; {'; '.join(paths)}. Columns: classes in turn ({classes})."


def comparison(teacher: Tensor, paths: dict[str, Tensor], labels: Tensor) -> bytes:
    rows = [teacher[:20], *(path[:20, -1] for path in paths.values())]
    return _png(image_grid(torch.cat(rows), columns=min(20, len(labels))))


def strips(states: Tensor, paths: dict[str, Tensor]) -> bytes:
    """One sample a row: the teacher's states, then each student's, all from the same noise."""
    strips = [states, *(torch.cat([states[:, :1], path], 1) for path in paths.values())]
    wide = torch.cat(strips, 1)[:8]
    return _png(image_grid(wide.flatten(0, 1), columns=wide.shape[1]))


def _png(picture: Tensor, zoom: int = 2) -> bytes:
    image = Image.fromarray(picture.numpy())
    buffer = io.BytesIO()
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def plot(figure: Figure, tight: bool = True) -> bytes:
    buffer = io.BytesIO()
    if tight:
        figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def curves_figure(
    curves: dict[str, list[dict[str, Any]]], seconds: dict[str, float | None], teacher: float
) -> bytes:
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for name, points in curves.items():
        if (taken := seconds[name]) is None:
            continue
        each = taken / points[-1]["step"]
        axes.plot(
            [each * p["step"] for p in points], [p["student"]["frechet"] for p in points], marker="o",
            label=name,
        )  # fmt: skip
    axes.axhline(teacher, color="grey", linestyle=":", label="teacher")
    axes.set(xlabel="seconds of training", ylabel="Frechet distance", yscale="log")
    axes.legend(fontsize=8)
    return plot(figure)


def loss_figure(runs: dict[str, Path]) -> bytes:
    figure = Figure(figsize=(11, 3.5))
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (name, folder) in zip(panels, runs.items(), strict=True):
        log = read_log(folder)
        for s in range(len(log[0]["terms"])):
            axes.plot(
                [line["step"] for line in log], [line["terms"][s] for line in log], label=f"step {s + 1}"
            )
        axes.set(title=name, xlabel="iteration", yscale="log")
        axes.legend()
    panels[0].set_ylabel("mean squared error (teacher forced)")
    return plot(figure)


def error_figure(rows: list[dict[str, Any]]) -> bytes:
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for row in rows[1:]:
        axes.plot(range(1, len(row["errors"]) + 1), row["errors"], marker="o", label=row["name"])
    axes.set(
        xlabel="step", ylabel="mean squared error (own roll-out)", xticks=range(1, len(rows[1]["errors"]) + 1)
    )
    axes.legend()
    return plot(figure)


def page(steps: int, result: dict[str, Any], pictures: dict[str, bytes], captions: dict[str, str]) -> str:
    head = "".join(f"<th>{c}</th>" for c in _COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in _cells(row))}</tr>" for row in result["rows"]
    )
    figures = "".join(
        f"<h2>{title}</h2><p>{html.escape(captions.get(title, ''))}"
        f'</p><img alt="{title}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for title, data in pictures.items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>ARD demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}}
img{{max-width:100%;image-rendering:pixelated}}
td,th{{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}}
td:first-child{{text-align:left}}</style>
<h1>Autoregressive distillation of a diffusion transformer</h1>
<p>{html.escape(_summary(result))} A student's cost is that of {steps} network evaluations.</p>
<table><tr>{head}</tr>{body}</table>
{figures}
<p>{html.escape(str(result["versions"]))}; the demo took {result["seconds"]:.0f} s.</p>
</html>
"""
