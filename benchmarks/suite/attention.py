"""Block attention against every way that PyTorch and its neighbours have for it.

Useful work is 4 * Dh * visible pairs * B * H operations forward and 3.5 times that with the backward,
whatever a method computes besides. Every method's output and gradients are compared with the eager backend in
float32 before it is timed: a wrong one is no peer.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ard_kernels import BlockLayout, block_attention, use_backend
from ard_kernels.layout import Mask
from ard_kernels.tune import check_results
from benchmarks.suite.record import Recorder, backends, compiled
from benchmarks.suite.timing import Prepare, sets_beyond_cache

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v (B, queries or keys, H, Dh) -> (B, queries, H, Dh)."""
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k, v, dout."""


@dataclass(frozen=True)
class Shape:
    """B samples of S blocks of L tokens, H heads of Dh."""

    batch: int
    blocks: int
    length: int
    heads: int
    dim: int
    dtype: str = "bfloat16"

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout.uniform(self.blocks, self.length)

    def __str__(self) -> str:
        dtype = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        return f"B{self.batch} S{self.blocks} L{self.length} H{self.heads} Dh{self.dim}{dtype}"


class Whole:
    """One call over all tokens, differentiated by autograd."""

    def __init__(self, attend: Attend) -> None:
        self.forward = attend

    def forward_backward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = self.forward(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)


class PerBlock:
    """Block-causal attention as one dense call per block of queries, on the prefix of keys that it sees.

    Gradients of the keys are summed in place: cheaper than what autograd makes of slices.
    """

    def __init__(self, dense: Attend, layout: BlockLayout) -> None:
        self.dense, self.layout = dense, layout

    def _pieces(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[list[Tensor]]:
        for s in range(self.layout.blocks):
            end = self.layout.bounds[s + 1]
            yield [q[:, self.layout.slice(s)], k[:, :end], v[:, :end]]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([self.dense(*piece) for piece in self._pieces(q, k, v)], 1)

    def forward_backward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        pieces = [[x.detach().requires_grad_() for x in piece] for piece in self._pieces(q, k, v)]
        outs = [self.dense(*piece) for piece in pieces]
        leaves = [x for piece in pieces for x in piece]
        grads = torch.autograd.grad(outs, leaves, dout.split(self.layout.lengths, 1))
        dk, dv = grads[-2:]  # the last block sees every key
        for s in range(self.layout.blocks - 1):
            end = self.layout.bounds[s + 1]
            dk[:, :end] += grads[3 * s + 1]
            dv[:, :end] += grads[3 * s + 2]
        return torch.cat(outs, 1), torch.cat(grads[0::3], 1), dk, dv


class Folded(Whole):
    """Block-diagonal attention as one dense call on B*S samples of L tokens."""

    def __init__(self, dense: Attend, layout: BlockLayout) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            folded = (x.unflatten(1, (layout.blocks, -1)).flatten(0, 1) for x in (q, k, v))
            return dense(*folded).unflatten(0, (-1, layout.blocks)).flatten(1, 2)

        super().__init__(attend)


Method = Whole | PerBlock


@dataclass(frozen=True)
class Candidate:
    """A method under a name, and what building it takes."""

    name: str
    build: Callable[[], Method]
    pad: int | None = None
    """The head dim to which its user pads q, k and v; the padding itself is not timed."""
    seconds: float = 1.0
    """That building may take, compilation and tuning."""
    ours: bool = False


def our_candidate(name: str, layout: BlockLayout, mask: Mask) -> Candidate:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with use_backend(name):
            return block_attention(q, k, v, layout, mask)

    return Candidate(f"ours ({name})", lambda: Whole(attend), ours=True, seconds=3)


def our_candidates(shape: Shape, mask: Mask, device: str) -> list[Candidate]:
    """The one that is chosen by default first."""
    dtype = getattr(torch, shape.dtype)
    names = backends("attention", torch.empty(1, 1, shape.heads, shape.dim, device=device, dtype=dtype))
    return [our_candidate(name, shape.layout, mask) for name in names]


def dense_candidates(shape: Shape, mask: Mask, every_pad: bool = False) -> list[Candidate]:
    """Those without compilation: per block for `causal`, folded for `diagonal`.

    every_pad: whether cuDNN gets all the paddings of head dim 72, not 128 alone. It makes a plan of a second
    for each shape that it meets, four of them forward and four backward for four blocks, and each pad.
    """
    layout, scale = shape.layout, shape.dim**-0.5
    decompose = PerBlock if mask == "causal" else Folded
    kinds = [("sdpa cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa flash", SDPBackend.FLASH_ATTENTION)]
    pads = [80, 96, 128] if shape.dim == 72 else []
    calls: list[tuple[str, Attend, int | None]] = [
        (f"{name}{f', padded to {pad}' if pad else ''}", partial(_sdpa, kind, scale), pad)
        for name, kind in kinds
        for pad in [None, *(pads if every_pad or kind != SDPBackend.CUDNN_ATTENTION else pads[-1:])]
    ]
    packages = {name: where for name, where in PACKAGES.items() if installed(where[0])}
    calls += [(name, partial(_imported, *where, scale), None) for name, where in packages.items()]
    made = [Candidate(name, partial(decompose, attend, layout), pad) for name, attend, pad in calls]
    dense = Candidate("sdpa dense mask", lambda: Whole(partial(_masked, layout, mask, scale)))
    one_launch = [
        Candidate(f"{name}, one launch", partial(Whole, partial(_one_launch, module, layout, scale)))
        for name, (module, _) in packages.items()
        if mask == "causal" and name != "xformers"
    ]
    return [*made, dense, *one_launch]


# Inductor's choice for head dim 128 on Hopper. For other dims it takes 64 x 64 with 4 warps, and
# max-autotune does not try this one there.
_FLEX_TILE = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}


def flex_candidate(
    shape: Shape,
    mask: Mask,
    device: str,
    block: int = 128,
    autotune: bool = False,
    pad: int | None = None,
    tile: dict[str, int] | None = None,
) -> Candidate:
    name = f"flex {block}{' max-autotune' if autotune else ''}{f', padded to {pad}' if pad else ''}"
    name += f", tile {tile['fwd_BLOCK_M']} x {tile['fwd_BLOCK_N']}" if tile else ""
    build = partial(_flex, shape, mask, device, block, autotune, tile)
    # Compiling forward and backward; tuning compiles six forwards, twice, and 28 backwards.
    return Candidate(name, build, pad, 60 if autotune else 12)


def _sdpa(kind: SDPBackend, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)


def _masked(layout: BlockLayout, mask: Mask, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    visible = _dense_mask(layout, mask, q.device)
    return F.scaled_dot_product_attention(*heads_first, visible, scale=scale).transpose(1, 2)


_masks: dict[tuple[Any, ...], Tensor] = {}


def _dense_mask(layout: BlockLayout, mask: Mask, device: torch.device) -> Tensor:
    key = (layout, mask, device)
    if key not in _masks:
        _masks.clear()  # 268 MB at 16384 tokens
        _masks[key] = layout.mask(mask, device)
    return _masks[key]


# Dense attention with tokens before heads, in packages that may be installed: module and function.
PACKAGES = {
    "flash-attention 2": ("flash_attn", "flash_attn_func"),
    "flash-attention 3": ("flash_attn_interface", "flash_attn_func"),
    "flash-attention 4": ("flash_attn.cute", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # of the package that it would be in: absent, or built for another PyTorch
        return False


def _imported(module: str, name: str, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attend = getattr(importlib.import_module(module), name)
    option = "scale" if module.startswith("xformers") else "softmax_scale"
    out = attend(q, k, v, **{option: scale})
    return out if isinstance(out, Tensor) else out[0]


def _one_launch(module: str, layout: BlockLayout, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every block of queries a sequence of its own, with a length of the cache that its sample shares: the
    block-causal forward in one launch. It has no backward."""
    attend = importlib.import_module(module).flash_attn_with_kvcache
    if torch.is_grad_enabled():
        raise RuntimeError("flash_attn_with_kvcache has no backward")
    ends, owner = _sequences(layout, len(q), q.device)
    folded = q.unflatten(1, (layout.blocks, -1)).flatten(0, 1)
    out = attend(folded, k, v, cache_seqlens=ends, cache_batch_idx=owner, softmax_scale=scale)
    return out.unflatten(0, (-1, layout.blocks)).flatten(1, 2)


@functools.cache
def _sequences(layout: BlockLayout, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 (batch * S,): how many keys each block of queries sees, and of which sample."""
    ends = torch.tensor(layout.bounds[1:], dtype=torch.int32, device=device).repeat(batch)
    return ends, torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(layout.blocks)


def _flex(
    shape: Shape, mask: Mask, device: str, block: int, autotune: bool, tile: dict[str, int] | None
) -> Method:
    length, total = shape.length, shape.layout.total

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j // length <= i // length if mask == "causal" else j // length == i // length

    blocks = create_block_mask(visible, None, None, total, total, device=device, BLOCK_SIZE=block)
    # Every row sees its own block, and what it sees is a single range.
    options = {"ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": True, **(tile or {})}
    mode = {"mode": "max-autotune-no-cudagraphs"} if autotune else {}
    attend = compiled(flex_attention, device, dynamic=False, **mode)
    scale = shape.dim**-0.5

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return attend(*heads_first, block_mask=blocks, scale=scale, kernel_options=options).transpose(1, 2)

    return Whole(call)


def make_inputs(shape: Shape, device: str, seed: int) -> Inputs:
    """q, k and v are slices of a packed qkv, as a model makes them."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.layout.total, 3, shape.heads, shape.dim)
    dtype = getattr(torch, shape.dtype)
    q, k, v = torch.randn(size, generator=generator, device=device, dtype=dtype).unbind(2)
    dout = torch.randn(q.shape, generator=generator, device=device, dtype=dtype)
    return q, k, v, dout


def padded(inputs: Inputs, shape: Shape, pad: int | None) -> Inputs:
    if pad is None:
        return inputs
    return tuple(F.pad(x, (0, pad - shape.dim)) for x in inputs)  # type: ignore[return-value]


PHASES = ("forward", "forward + backward")


def prepared(method: Method, sets: list[Inputs], phase: str) -> Prepare:
    """The timed call of one phase."""

    def prepare(i: int) -> Callable[[], object]:
        q, k, v, dout = sets[i % len(sets)]
        if phase == "forward + backward":
            return lambda: method.forward_backward(q, k, v, dout)

        def forward() -> object:
            with torch.no_grad():
                return method.forward(q, k, v)

        return forward

    return prepare


def _exact(inputs: Inputs, shape: Shape, mask: Mask) -> list[Tensor]:
    with use_backend("eager"):
        method = Whole(lambda q, k, v: block_attention(q, k, v, shape.layout, mask))
        return [x.detach() for x in method.forward_backward(*(x.float() for x in inputs))]


def _checked(prepare: Prepare, exact: list[Tensor], dim: int) -> Prepare:
    """`prepare`, if its results for the first set of inputs are right."""
    got: Any = prepare(0)()
    tensors = got if isinstance(got, tuple) else (got,)
    many = len(tensors)
    check_results([x.detach()[..., :dim] for x in tensors], exact[:many], ("out", "dq", "dk", "dv")[:many])
    return prepare


def compare(rec: Recorder, shape: Shape, mask: Mask, candidates: list[Candidate]) -> None:
    """Checks and times all candidates on one shape: a row for each phase."""
    where = f"{shape} {mask}"
    first = make_inputs(shape, rec.device, 0)
    exact = rec.attempt(f"{where} reference", lambda: _exact(first, shape, mask), ours=True)
    if exact is None:
        return
    count = sets_beyond_cache(rec.device, sum(x.nbytes for x in first))
    plain = [first, *(make_inputs(shape, rec.device, seed) for seed in range(1, count))]
    pads = {candidate.pad for candidate in candidates}
    sets = {pad: [padded(inputs, shape, pad) for inputs in plain] for pad in pads}
    ready: dict[str, dict[str, Prepare]] = {phase: {} for phase in PHASES}
    for candidate in candidates:
        method = rec.attempt(f"{where} {candidate.name}", candidate.build, candidate.seconds, candidate.ours)
        if method is None:
            continue
        for phase in PHASES:
            checked = partial(_checked, prepared(method, sets[candidate.pad], phase), exact, shape.dim)
            prepare = rec.attempt(f"{where} {candidate.name} {phase}", checked, ours=candidate.ours)
            if prepare is None:
                break
            ready[phase][candidate.name] = prepare
    for phase in PHASES:
        times = rec.measure(f"{where} {phase}", ready[phase])
        if times:
            _record(rec, shape, mask, phase, times)


def _record(rec: Recorder, shape: Shape, mask: Mask, phase: str, times: dict[str, dict[str, float]]) -> None:
    forward = 4 * shape.dim * shape.layout.area(mask) * shape.batch * shape.heads
    operations = forward if phase == "forward" else 3.5 * forward
    for time in times.values():
        time["tflops"] = operations / time["ms"] / 1e9
        time["percent"] = rec.settings.percent("matmul", time["tflops"])  # type: ignore[assignment]
    mine = [name for name in times if name.startswith("ours")]
    peers = [name for name in times if name not in mine]
    best = min(peers, key=lambda name: times[name]["ms"], default=None)
    ours = next(iter(mine), None)  # what is chosen by default
    ratio = times[best]["ms"] / times[ours]["ms"] if best and ours else None
    line = f"{shape} {mask} {phase}: " + ", ".join(
        f"{name} {time['ms']:.3f} ms {time['tflops']:.0f} TFLOP/s" for name, time in times.items()
    )
    rec.row(line, shape=asdict(shape), label=str(shape), mask=mask, phase=phase, times=times, ours=ours,
            best_peer=best, ratio=ratio)  # fmt: skip


# (L, B): 32768 tokens a call fill the chip.
_FILLING = ((256, 32), (1024, 8), (4096, 2))


def shapes(quick: bool, dim: int = 72, batch: int | None = None) -> list[Shape]:
    if quick:
        return [Shape(2, 2, 16, 2, 24)]
    return [Shape(batch or b, 4, length, 16, dim) for length, b in _FILLING]


def attention(rec: Recorder) -> None:
    """The most telling comparisons first: what is left out when time runs out is the least."""

    def everything(shape: Shape, mask: Mask, every_pad: bool = False) -> None:
        flex = [flex_candidate(shape, mask, rec.device)]
        if rec.device == "cuda" and shape.dim not in (64, 128):
            flex.append(flex_candidate(shape, mask, rec.device, tile=_FLEX_TILE))
        ours = our_candidates(shape, mask, rec.device)
        compare(rec, shape, mask, [*ours, *dense_candidates(shape, mask, every_pad), *flex])

    def in_tf32(shape: Shape, mask: Mask) -> None:
        """Our backends against each other: the kernel is chosen where TF32 products are allowed."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            compare(rec, shape, mask, our_candidates(shape, mask, rec.device))
        finally:
            torch.set_float32_matmul_precision(before)

    def with_flex(shape: Shape, mask: Mask, **options: Any) -> None:
        flex = flex_candidate(shape, mask, rec.device, **options)
        compare(rec, shape, mask, [*our_candidates(shape, mask, rec.device)[:1], flex])

    for name, (module, _) in PACKAGES.items():
        if not installed(module):
            rec.error(name, "not installed, or its package does not import")
    plan: list[tuple[Callable[..., None], Shape, Mask, dict[str, Any], float]] = []
    first, *others = shapes(True) if rec.quick else [shapes(False)[i] for i in (1, 0, 2)]
    middle_first = [first, *others]
    plan += [(everything, shape, "causal", {"every_pad": shape == first}, 5) for shape in middle_first]
    if not rec.quick:
        plan += [(with_flex, first, "causal", {"autotune": True}, 60)]
    plan += [(everything, shape, "diagonal", {}, 5) for shape in middle_first]
    plan += [(in_tf32, replace(first, dtype="float32"), "causal", {}, 5)]
    if not rec.quick:
        plan += [(with_flex, shape, "causal", {"autotune": True}, 60) for shape in others]
        plan += [(everything, shape, "causal", {}, 5) for shape in shapes(False, 72, 1)]
        plan += [(everything, shape, "causal", {}, 5) for dim in (64, 128) for shape in shapes(False, dim)]
        plan += [(with_flex, shape, "causal", {"block": 256}, 15) for shape in middle_first]
        plan += [(with_flex, shape, "causal", {"pad": 128}, 15) for shape in middle_first]
        plan += [(with_flex, s, "causal", {"block": 256, "autotune": True}, 60) for s in middle_first]
        plan += [(everything, shape, "diagonal", {}, 5) for dim in (64, 128) for shape in shapes(False, dim)]
        plan += [(everything, shape, "diagonal", {}, 5) for shape in shapes(False, 72, 1)]
        plan += [(everything, s, "causal", {}, 5) for dim in (64, 128) for s in shapes(False, dim, 1)]
    for run, shape, mask, options, needs in plan:
        what = " ".join([str(shape), mask, *(f"{k} {v}" for k, v in options.items())])
        rec.attempt(what, partial(run, shape, mask, **options), needs)
        torch.compiler.reset()
        if rec.device == "cuda":
            torch.cuda.empty_cache()
