"""The fused adaLN pass, x + gate * h and then a modulated layer norm, and its two halves, against PyTorch and
its compiler.

Bandwidth counts the passes over big tensors that an ideal kernel makes, whatever a method makes: 4 forward
(reads x and h, writes both results), 6 backward (reads both gradients, the stored residual and h, writes
dx and dh). `adaln` is the shape that the goals are set for, `adaln_more` the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ard_kernels
from ard_kernels import BlockLayout, gated_residual_adaln, use_backend
from ard_kernels.tune import check_results
from benchmarks.suite.record import Recorder, backends, compared, compiled
from benchmarks.suite.timing import Prepare, cache_bytes, sets_beyond_cache

Norm = Callable[..., tuple[Tensor, ...]]
"""Of x, h (B, T, D), gate, shift, scale (B, K, D), those that the operator takes -> the residual and its
modulated norm, or one of the two."""
Inputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""The operator's, and the gradients of its results."""

PHASES = ("forward", "backward")

# Big tensors in the dtype of the residual stream, and in that of the branch, that are read and written.
_PASSES = {
    "gated_residual_adaln": {"forward": (2, 2), "backward": (3, 3)},
    "adaln": {"forward": (1, 1), "backward": (2, 1)},
    "gated_residual": {"forward": (2, 1), "backward": (1, 2)},  # its dx is the gradient that it gets
}


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    width: int
    blocks: int
    operator: str = "gated_residual_adaln"
    residual: str = "bfloat16"
    """dtype of the residual stream; branch, tables and the norm are bfloat16, as under autocast."""

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout.uniform(self.blocks, self.tokens // self.blocks)

    def __str__(self) -> str:
        operator = "" if self.operator == "gated_residual_adaln" else f" {self.operator}"
        residual = "" if self.residual == "bfloat16" else f" {self.residual} residual"
        return f"({self.batch}, {self.tokens}, {self.width}) K{self.blocks}{operator}{residual}"

    def bytes_moved(self, phase: str) -> int:
        wide, narrow = _PASSES[self.operator][phase]
        sizes = wide * getattr(torch, self.residual).itemsize + narrow * torch.bfloat16.itemsize
        return int(sizes * self.batch * self.tokens * self.width)


# As a user of PyTorch writes them, with one row per block, never per token.


def _blocks(x: Tensor, table: Tensor) -> Tensor:
    return x.unflatten(1, (table.shape[1], -1))


def _plain_residual(x: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    return (x + (gate.unsqueeze(2) * _blocks(h, gate)).flatten(1, 2),)


def _plain_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    normed = _blocks(F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)
    return ((normed * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(scale.dtype),)


def plain(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    (x,) = _plain_residual(x, h, gate)
    return x, *_plain_adaln(x, shift, scale)


_PLAIN: dict[str, Norm] = {
    "gated_residual_adaln": plain,
    "adaln": _plain_adaln,
    "gated_residual": _plain_residual,
}


def ours(backend: str, shape: Shape, device: str) -> Norm:
    operator, layout = getattr(ard_kernels, shape.operator), shape.layout
    mixed = partial(torch.autocast, device, torch.bfloat16, enabled=shape.residual != "bfloat16")

    def norm(*inputs: Tensor) -> tuple[Tensor, ...]:
        with use_backend(backend), mixed():
            outs = operator(*inputs, layout)
        return (outs,) if isinstance(outs, Tensor) else outs

    return norm


_TUNED = "torch.compile max-autotune"
PEERS = ("pytorch", "torch.compile", _TUNED)


def candidates(shape: Shape, device: str, mine: list[str]) -> dict[str, tuple[Callable[[], Norm], float]]:
    """How each is built, and the seconds that may take."""
    function = _PLAIN[shape.operator]
    tune = {"mode": "max-autotune-no-cudagraphs"}
    return {
        **{f"ours ({name})": (partial(ours, name, shape, device), 3) for name in mine},
        "pytorch": (lambda: function, 1),
        "torch.compile": (lambda: compiled(function, device, dynamic=False), 12),
        _TUNED: (lambda: compiled(function, device, dynamic=False, **tune), 20),
    }


def make_inputs(shape: Shape, device: str, seed: int) -> Inputs:
    """Tables are strided, as slices of a packed one."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    x, h, dx, dy = (draw(shape.batch, shape.tokens, shape.width) for _ in range(4))
    x, dx = (tensor.to(getattr(torch, shape.residual)) for tensor in (x, dx))
    _, _, gate, shift, scale, _ = draw(shape.batch, shape.blocks, 6, shape.width).unbind(2)
    if shape.operator == "adaln":
        return (x, shift, scale), (dy,)
    if shape.operator == "gated_residual":
        return (x, h, gate), (dx,)
    return (x, h, gate, shift, scale), (dx, dy)


def prepared(norm: Norm, sets: list[Inputs], phase: str) -> Prepare:
    def forward(i: int) -> Callable[[], object]:
        inputs, _ = sets[i % len(sets)]

        def run() -> object:
            with torch.no_grad():
                return norm(*inputs)

        return run

    def backward(i: int) -> Callable[[], object]:
        inputs, douts = sets[i % len(sets)]
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = norm(*leaves)
        return lambda: torch.autograd.grad(outs, leaves, douts)

    return forward if phase == "forward" else backward


def compare(rec: Recorder, shape: Shape, tuned: bool) -> None:
    """Ours by default against the compiler that searches, or ours against all else."""
    first = make_inputs(shape, rec.device, 0)
    count = sets_beyond_cache(rec.device, shape.bytes_moved("forward"))
    sets = [first, *(make_inputs(shape, rec.device, seed) for seed in range(1, count))]
    wide: Inputs = tuple(tuple(x.float() for x in tensors) for tensors in first)  # type: ignore[assignment]
    exact = {phase: prepared(_PLAIN[shape.operator], [wide], phase)(0)() for phase in PHASES}
    torch.compiler.reset()
    ready: dict[str, dict[str, Prepare]] = {phase: {} for phase in PHASES}
    known = candidates(shape, rec.device, backends("adaln", *first[0]))
    chosen = [next(iter(known)), _TUNED] if tuned else [name for name in known if name != _TUNED]
    for name, (build, seconds) in ((name, known[name]) for name in chosen):
        own = name.startswith("ours")
        norm = rec.attempt(f"{shape} {name}", build, seconds, own)
        if norm is None:
            continue
        for phase in PHASES:
            checked = partial(_checked, prepared(norm, sets, phase), exact[phase])
            prepare = rec.attempt(f"{shape} {name} {phase}", checked, ours=own)
            if prepare is not None:
                ready[phase][name] = prepare
    for phase in PHASES:
        times = rec.measure(f"{shape} {phase}", ready[phase])
        moved = shape.bytes_moved(phase)
        for time in times.values():
            time["gbs"] = moved / time["ms"] / 1e6
            # About half of the bytes are writes. Those that fit into the cache may never reach memory.
            large = moved > 2 * cache_bytes(rec.device)
            time["percent"] = rec.settings.percent("copy", time["gbs"]) if large else None
        _row(rec, str(shape), phase, times, PEERS)


def _checked(prepare: Prepare, exact: Any) -> Prepare:
    """`prepare`, if its results for the first set of inputs are right."""
    got: Any = prepare(0)()
    # As for attention, but for the gradients of tables: sums over a block's tokens, rounded once.
    names = [f"result {i}" for i in range(len(exact))]
    check_results([x.detach() for x in got], [x.detach() for x in exact], names)
    return prepare


def _row(
    rec: Recorder, label: str, phase: str, times: dict[str, dict[str, Any]], others: Iterable[str]
) -> None:
    if not times:
        return
    line = ", ".join(
        f"{name} {time['ms']:.4f} ms" + (f" {time['gbs']:.0f} GB/s" if "gbs" in time else "")
        for name, time in times.items()
    )
    rec.row(f"{label} {phase}: {line}", label=label, phase=phase,
            **compared(rec, label, times, others, (*PHASES, phase)))  # fmt: skip


def compare_in_block(rec: Recorder, shape: Shape, heads: int) -> None:
    """A DiT block's forward and backward, compiled as a whole; only the two fused passes differ."""
    from ard.models.dit import DiTBlock
    from ard.models.history import TeacherForced

    block = DiTBlock(shape.width, heads, 4.0).to(rec.device, torch.bfloat16)
    history = TeacherForced(shape.layout, 1, "causal")
    weights = [p for name, p in block.named_parameters() if "adaLN" not in name]

    def through(norm: Norm) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor, y: Tensor, own: Tensor, following: Tensor) -> tuple[Tensor, ...]:
            _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = own.unbind(2)
            branch = block.attn(y, partial(history.attend, 0))
            x, y = norm(x, branch, gate_attn, shift_mlp, scale_mlp)
            return norm(x, block.mlp(y), gate_mlp, following[:, :, 0], following[:, :, 1])

        return run

    draw = partial(torch.randn, device=rec.device, dtype=torch.bfloat16)
    size = (shape.batch, shape.tokens, shape.width)
    x, y, dx, dy = (draw(size) for _ in range(4))
    own, following = (draw(shape.batch, shape.blocks, 6, shape.width) for _ in range(2))

    def prepare_with(run: Callable[..., tuple[Tensor, ...]]) -> Prepare:
        def prepare(i: int) -> Callable[[], object]:
            def step() -> object:
                leaves = [t.detach().requires_grad_() for t in (x, y, own, following)]
                return torch.autograd.grad(run(*leaves), [*leaves, *weights], (dx, dy))

            return step

        return prepare

    # The backend is chosen around the compiled code, as a program does, not inside.
    fused: Norm = partial(gated_residual_adaln, layout=shape.layout)
    best = backends("adaln", x, own)[0]
    sides = {f"ours ({best})": fused, "pytorch": plain}
    phase = "forward + backward"
    # Tuning takes 12 matrix products' time.
    for mode, seconds in (("default", 15), ("max-autotune-no-cudagraphs", 50)):
        where = f"{shape}, whole DiT block, {mode}"
        ready: dict[str, Prepare] = {}
        for name, norm in sides.items():

            def build(norm: Norm = norm, mode: str = mode) -> Prepare:
                # fullgraph: the block's attention is our operator in both, and must not break the graph.
                with use_backend(best):
                    run = compiled(through(norm), rec.device, dynamic=False, fullgraph=True, mode=mode)
                    prepare = prepare_with(run)
                    prepare(0)()
                return prepare

            made = rec.attempt(f"{where} {name}", build, seconds, ours=norm is fused)
            if made is not None:
                ready[name] = made
        with use_backend(best):
            times = rec.measure(f"{where} {phase}", ready)
        _row(rec, where, phase, times, ["pytorch"])
        torch.compiler.reset()


def shapes(quick: bool) -> list[Shape]:
    if quick:
        return [Shape(2, 32, 64, 4)]
    return [Shape(32, 1024, 1152, 4), Shape(8, 1024, 1152, 4), Shape(1, 1024, 1152, 4)]


def _both(rec: Recorder, shape: Shape) -> None:
    """What takes no search is written down before a search may take too long."""
    for tuned in (False, True):
        what = f"{shape}{', max-autotune' if tuned else ''}"
        rec.attempt(what, partial(compare, rec, shape, tuned), 25 if tuned and not rec.quick else 5)
        torch.compiler.reset()


def adaln(rec: Recorder) -> None:
    _both(rec, shapes(rec.quick)[0])


def adaln_more(rec: Recorder) -> None:
    first, *others = shapes(rec.quick)
    others = [replace(first, residual="float32"), *others]
    others += [replace(first, operator=operator) for operator in ("adaln", "gated_residual")]
    for shape in others:
        _both(rec, shape)
    heads = 2 if rec.quick else 16
    rec.attempt(f"{first}, whole DiT block", partial(compare_in_block, rec, first, heads), 30)
