"""The fused adaLN pass, x + gate * h and then a modulated layer norm, against PyTorch and its compiler.

Bandwidth counts the passes over big tensors that an ideal kernel makes, whatever a method makes: 4 forward
(reads x and h, writes both results), 6 backward (reads both gradients, the stored residual and h, writes
dx and dh).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ard_kernels import BlockLayout, gated_residual_adaln, use_backend
from ard_kernels.tune import check_results
from benchmarks.suite.record import Recorder, backends, compiled
from benchmarks.suite.timing import Prepare, cache_bytes, sets_beyond_cache

Norm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""x, h (B, T, D), gate, shift, scale (B, K, D) -> the residual and its modulated norm."""

PHASES = {"forward": 4, "backward": 6}
"""And the passes over big tensors."""


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    width: int
    blocks: int

    def __str__(self) -> str:
        return f"({self.batch}, {self.tokens}, {self.width}) K{self.blocks}"


def plain(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As a user of PyTorch writes it, with one row per block, never per token."""

    def blocks(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (gate.shape[1], -1))

    x = x + (gate.unsqueeze(2) * blocks(h)).flatten(1, 2)
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x, (blocks(normed) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def ours(backend: str, layout: BlockLayout) -> Norm:
    def norm(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        with use_backend(backend):
            return gated_residual_adaln(x, h, gate, shift, scale, layout)

    return norm


def candidates(shape: Shape, device: str, mine: list[str]) -> dict[str, tuple[Callable[[], Norm], float]]:
    """How each is built, and the seconds that may take."""
    layout = BlockLayout.uniform(shape.blocks, shape.tokens // shape.blocks)
    tune = {"mode": "max-autotune-no-cudagraphs"}
    return {
        **{f"ours ({name})": (partial(ours, name, layout), 3) for name in mine},
        "pytorch": (lambda: plain, 1),
        "torch.compile": (lambda: compiled(plain, device, dynamic=False), 12),
        "torch.compile max-autotune": (lambda: compiled(plain, device, dynamic=False, **tune), 20),
    }


def make_inputs(shape: Shape, device: str, seed: int) -> tuple[Tensor, ...]:
    """x, h; gate, shift and scale, strided as slices of a packed table; and the two output gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    x, h, dx, dy = (draw(shape.batch, shape.tokens, shape.width) for _ in range(4))
    table = draw(shape.batch, shape.blocks, 6, shape.width)
    return x, h, table[:, :, 2], table[:, :, 3], table[:, :, 4], dx, dy


def prepared(norm: Norm, sets: list[tuple[Tensor, ...]], phase: str) -> Prepare:
    def forward(i: int) -> Callable[[], object]:
        inputs = sets[i % len(sets)][:5]

        def run() -> object:
            with torch.no_grad():
                return norm(*inputs)

        return run

    def backward(i: int) -> Callable[[], object]:
        *inputs, dx, dy = sets[i % len(sets)]
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = norm(*leaves)
        return lambda: torch.autograd.grad(outs, leaves, (dx, dy))

    return forward if phase == "forward" else backward


def compare(rec: Recorder, shape: Shape) -> None:
    first = make_inputs(shape, rec.device, 0)
    sets = [first]
    big = first[0].nbytes
    for seed in range(1, sets_beyond_cache(rec.device, 4 * big)):
        sets.append(make_inputs(shape, rec.device, seed))
    exact = {phase: prepared(plain, [tuple(x.float() for x in first)], phase)(0)() for phase in PHASES}
    torch.compiler.reset()
    ready: dict[str, dict[str, Prepare]] = {phase: {} for phase in PHASES}
    mine = backends("adaln", *first[:5])
    for name, (build, seconds) in candidates(shape, rec.device, mine).items():
        own = name.startswith("ours")
        norm = rec.attempt(f"{shape} {name}", build, seconds, own)
        if norm is None:
            continue
        for phase in PHASES:
            checked = partial(_checked, prepared(norm, sets, phase), exact[phase])
            prepare = rec.attempt(f"{shape} {name} {phase}", checked, ours=own)
            if prepare is not None:
                ready[phase][name] = prepare
    for phase, passes in PHASES.items():
        times = rec.measure(f"{shape} {phase}", ready[phase])
        for time in times.values():
            time["gbs"] = passes * big / time["ms"] / 1e6
            # About half of the bytes are writes. Those that fit into the cache may never reach memory.
            large = passes * big > 2 * cache_bytes(rec.device)
            time["percent"] = rec.settings.percent("copy", time["gbs"]) if large else None
        _row(rec, str(shape), phase, times)


def _checked(prepare: Prepare, exact: Any) -> Prepare:
    """`prepare`, if its results for the first set of inputs are right."""
    got: Any = prepare(0)()
    # As for attention, but for the gradients of tables: sums over a block's tokens, rounded once.
    names = [f"result {i}" for i in range(len(exact))]
    check_results([x.detach() for x in got], [x.detach() for x in exact], names)
    return prepare


def _row(rec: Recorder, label: str, phase: str, times: dict[str, dict[str, float]]) -> None:
    if not times:
        return
    mine = next((name for name in times if name.startswith("ours")), None)  # what is chosen by default
    best = min((n for n in times if not n.startswith("ours")), key=lambda n: times[n]["ms"], default=None)
    ratio = times[best]["ms"] / times[mine]["ms"] if best and mine else None
    line = ", ".join(
        f"{name} {time['ms']:.4f} ms" + (f" {time['gbs']:.0f} GB/s" if "gbs" in time else "")
        for name, time in times.items()
    )
    rec.row(f"{label} {phase}: {line}", label=label, phase=phase, times=times, ours=mine, best_peer=best,
            ratio=ratio)  # fmt: skip


def compare_in_block(rec: Recorder, shape: Shape, heads: int) -> None:
    """A DiT block's forward and backward, compiled as a whole; only the two fused passes differ."""
    from ard.models.dit import DiTBlock
    from ard.models.history import TeacherForced

    layout = BlockLayout.uniform(shape.blocks, shape.tokens // shape.blocks)
    block = DiTBlock(shape.width, heads, 4.0).to(rec.device, torch.bfloat16)
    history = TeacherForced(layout, 1, "causal")
    weights = [p for name, p in block.named_parameters() if "adaLN" not in name]

    def through(norm: Norm) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(x: Tensor, y: Tensor, own: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
            _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = own.unbind(2)
            branch = block.attn(y, partial(history.attend, 0))
            x, y = norm(x, branch, gate_attn, shift_mlp, scale_mlp)
            return norm(x, block.mlp(y), gate_mlp, following[:, :, 0], following[:, :, 1])

        return run

    draw = partial(torch.randn, device=rec.device, dtype=torch.bfloat16)
    size = (shape.batch, shape.tokens, shape.width)
    x, y, dx, dy = (draw(size) for _ in range(4))
    own, following = (draw(shape.batch, shape.blocks, 6, shape.width) for _ in range(2))

    def prepare_with(run: Callable[..., tuple[Tensor, Tensor]]) -> Prepare:
        def prepare(i: int) -> Callable[[], object]:
            def step() -> object:
                leaves = [t.detach().requires_grad_() for t in (x, y, own, following)]
                return torch.autograd.grad(run(*leaves), [*leaves, *weights], (dx, dy))

            return step

        return prepare

    ready: dict[str, Prepare] = {}
    # The backend is chosen around the compiled code, as a program does, not inside.
    fused: Norm = partial(gated_residual_adaln, layout=layout)
    best = backends("adaln", x, own)[0]
    for name, norm in ((f"ours ({best})", fused), ("pytorch", plain)):

        def build(norm: Norm = norm) -> Prepare:
            # fullgraph: the block's attention is our operator in both, and must not break the graph.
            with use_backend(best):
                prepare = prepare_with(compiled(through(norm), rec.device, dynamic=False, fullgraph=True))
                prepare(0)()
            return prepare

        made = rec.attempt(f"compiled block, {name}", build, 15, ours=name.startswith("ours"))
        if made is not None:
            ready[f"{name}, compiled block"] = made
    with use_backend(best):
        times = rec.measure(f"{shape}, whole DiT block", ready)
    _row(rec, f"{shape}, whole DiT block", "forward + backward", times)


def shapes(quick: bool) -> list[Shape]:
    if quick:
        return [Shape(2, 32, 64, 4)]
    return [Shape(32, 1024, 1152, 4), Shape(8, 1024, 1152, 4), Shape(1, 1024, 1152, 4)]


def adaln(rec: Recorder) -> None:
    for i, shape in enumerate(shapes(rec.quick)):
        rec.attempt(str(shape), partial(compare, rec, shape), 5)
        if i == 0:
            heads = 2 if rec.quick else 16
            rec.attempt(f"{shape}, whole DiT block", partial(compare_in_block, rec, shape, heads), 30)
    torch.compiler.reset()
