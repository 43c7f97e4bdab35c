"""Block attention: a check against the reference, and time against what PyTorch offers, as JSON and a picture
beside it.

    python -m benchmarks.attn_mask [--shapes small|default] [--dtype bfloat16] [--out FILE]
    python -m benchmarks.attn_mask --masks docs/masks.png      # a picture of the four masks, and nothing else

Peers are dense-mask SDPA and compiled FlexAttention, both given their mask ready made. A peer that fails
says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ard_kernels import BlockLayout, block_attention, reference, use_backend
from ard_kernels.layout import MASKS, Mask
from benchmarks.common import RESULTS, environment, medians, write_json
from benchmarks.suite.attention import Shape
from benchmarks.suite.record import backends

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# DiT-S/2-like and DiT-XL/2 at 256 px; the GPU gets the batch of a training step.
_SHORT, _LONG, _LONGEST = (BlockLayout.uniform(4, length) for length in (64, 256, 4096))
SHAPES = {
    ("cpu", "small"): (Shape(4, _SHORT, 6, 64),),
    ("cpu", "default"): (Shape(4, _SHORT, 6, 64), Shape(1, _LONG, 6, 64), Shape(1, _LONG, 16, 72)),
    ("cuda", "small"): (Shape(8, _LONG, 6, 64),),
    ("cuda", "default"): (Shape(32, _LONG, 6, 64), Shape(32, _LONG, 16, 72), Shape(2, _LONGEST, 16, 72)),
}
REPEATS = 7


def _forward_backward(
    attend: Callable[..., Tensor], tensors: tuple[Tensor, ...], dout: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The largest error of output, dq, dk and dv of every backend and mask, in epsilons, against float64."""
    layout = BlockLayout((16, 64, 5, 40))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for kind in (torch.float64, torch.float32, dtype):
        q, k, v, dout = torch.randn(4, 2, layout.total, 2, 72, generator=generator, dtype=torch.float64).to(
            kind
        )
        inputs = tuple(x.to(device) for x in (q, k, v))
        for mask in MASKS:
            exact = _forward_backward(
                lambda *x, m=mask: reference.block_attention(*x, layout, m),
                tuple(x.double() for x in inputs),
                dout.to(device).double(),
            )
            for backend in backends("attention", *inputs):
                with use_backend(backend):
                    got = _forward_backward(
                        lambda *x, m=mask: block_attention(*x, layout, m), inputs, dout.to(device)
                    )
                unit = torch.finfo(kind).eps
                errors = [
                    float((a.double() - b).abs().max() / max(float(b.abs().max()), 1.0) / unit)
                    for a, b in zip(got, exact, strict=True)
                ]
                # The bound of tests/ard_kernels/test_attention.py.
                if max(errors) > TOLERANCE:
                    raise SystemExit(f"{backend}, {mask}, {kind}: {errors} epsilons off the reference")
                rows.append({"backend": backend, "mask": mask, "dtype": str(kind), "epsilons": errors})
    return rows


TOLERANCE = 24.0


def _flex(layout: BlockLayout, mask: Mask, device: str) -> Callable[..., Tensor]:
    owner = layout.block_ids(device)
    visible: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "causal": lambda i, j: j <= i,
        "diagonal": lambda i, j: i == j,
        "window": lambda i, j: (i == j) | (i == j + 1),
        "anchor": lambda i, j: (i == j) | (j == 0),
    }
    sees = visible[mask]
    blocks = create_block_mask(
        lambda b, h, i, j: sees(owner[i], owner[j]), None, None, layout.total, layout.total, device=device
    )
    # A compilation of its own for this shape and mask, not one with dynamic shapes, nor the uncompiled
    # operator that a ninth recompilation would fall back to.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks).transpose(
        1, 2
    )


def _candidates(layout: BlockLayout, mask: Mask, q: Tensor) -> dict[str, Callable[..., Tensor]]:
    def ours(backend: str) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with use_backend(backend):
                return block_attention(q, k, v, layout, mask)

        return attend

    dense = layout.mask(mask, q.device)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=dense).transpose(1, 2)

    flex = _flex(layout, mask, q.device.type)
    return {**{name: ours(name) for name in backends("attention", q)}, "sdpa": sdpa, "flex": flex}


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def measure(shape: Shape, mask: Mask, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds by candidate for `forward` and `forward_backward`, and why a candidate has none."""
    layout = shape.layout
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(
        shape.batch, layout.total, 3, shape.heads, shape.dim, generator=generator, dtype=torch.float32
    ).to(device, dtype)
    inputs = packed.unbind(2)
    dout = torch.ones(inputs[0].shape, device=device, dtype=dtype)
    described = {**asdict(shape), "layout": layout.lengths}
    row: dict[str, Any] = {"shape": described, "label": str(shape), "mask": mask, "reasons": {}}
    for phase in ("forward", "forward_backward"):
        runs: dict[str, Callable[[], object]] = {}
        for name, attend in _candidates(layout, mask, inputs[0]).items():

            def run(attend: Callable[..., Tensor] = attend, phase: str = phase) -> object:
                if phase == "forward_backward":
                    return _forward_backward(attend, inputs, dout)
                with torch.no_grad():
                    return attend(*inputs)

            try:
                run()
            except Exception as error:  # a peer may fail in any way; the table says which
                row["reasons"][f"{name} {phase}"] = _reason(error)
            else:
                runs[name] = run
        row[phase] = {name: 1e3 * seconds for name, seconds in medians(runs, REPEATS).items()}
    return row


def draw_masks(path: Path) -> None:
    layout = BlockLayout.uniform(4, 8)
    figure, axes = plt.subplots(1, len(MASKS), figsize=(11, 3), layout="constrained")
    for axis, mask in zip(axes, MASKS, strict=True):
        axis.imshow(layout.mask(mask), cmap="Blues", vmin=0, vmax=1.4)
        for bound in layout.bounds[1:-1]:
            axis.axhline(bound - 0.5, color="grey", linewidth=0.6)
            axis.axvline(bound - 0.5, color="grey", linewidth=0.6)
        centres = [(a + b - 1) / 2 for a, b in zip(layout.bounds, layout.bounds[1:], strict=False)]
        axis.set_xticks(centres, range(layout.blocks))
        axis.set_yticks(centres, range(layout.blocks))
        axis.set_title(mask)
        axis.set_xlabel("block of keys")
    axes[0].set_ylabel("block of queries")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def draw_times(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    names = list(dict.fromkeys(name for row in rows for name in (*row["forward"], *row["forward_backward"])))
    figure, axes = plt.subplots(2, 1, figsize=(11, 6.5), layout="constrained", sharex=True)
    for axis, phase in zip(axes, ("forward", "forward_backward"), strict=True):
        for i, name in enumerate(names):
            at = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(rows))]
            axis.bar(at, [row[phase].get(name, float("nan")) for row in rows], 0.8 / len(names), label=name)
        axis.set_yscale("log")
        axis.set_ylabel("ms")
        axis.set_title(phase.replace("_", " + "))
    labels = [f"{row['mask']}\n{row['label']}" for row in rows]
    axes[1].set_xticks(range(len(rows)), labels, rotation=60, fontsize=7, ha="right")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=("small", "default"), default="default")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS / f"attn_mask-{device}.json")
    parser.add_argument("--masks", type=Path)
    options = parser.parse_args(arguments)
    if options.masks is not None:
        draw_masks(options.masks)
        return
    dtype = getattr(torch, options.dtype)

    record = environment()
    errors = check(device, dtype)
    worst = {
        (e["backend"], e["dtype"]): max(
            max(o["epsilons"]) for o in errors if (o["backend"], o["dtype"]) == (e["backend"], e["dtype"])
        )
        for e in errors
    }
    for (backend, kind), epsilons in worst.items():
        print(
            f"{backend} {kind}: at most {epsilons:.2f} eps from the float64 reference, forward and gradients"
        )

    rows = []
    print(f"{'shape':26} {'mask':9} {'phase':17} milliseconds, median of {REPEATS}")
    for shape in SHAPES[device, options.shapes]:
        for mask in MASKS:
            row = measure(shape, mask, device, dtype)
            rows.append(row)
            for phase in ("forward", "forward_backward"):
                times = "  ".join(f"{name} {ms:9.3f}" for name, ms in row[phase].items())
                print(f"{shape!s:26} {mask:9} {phase:17} {times}", flush=True)
    for name, reason in {name: reason for row in rows for name, reason in row["reasons"].items()}.items():
        print(f"{name}: not measured: {reason}")

    write_json(
        options.out, {"environment": record, "dtype": options.dtype, "accuracy": errors, "times": rows}
    )
    machine = record["gpu"] or f"{record['cpu']}, {record['threads']} threads"
    draw_times(rows, options.out.with_suffix(".png"), f"block attention, {options.dtype}, {machine}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
