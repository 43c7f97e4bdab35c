"""Block attention against every way that PyTorch and its neighbours have for it.

Useful work is 4 * Dh * visible pairs * B * H operations forward and 2.5 times that backward, whatever a
method computes besides. Every method's output and gradients are compared with the eager backend in float32
before it is timed: a wrong one is no peer.

`attention` is block-causal attention at head dim 72, and a step with a KV cache; `attention_tuned` compares
the former with FlexAttention's slower settings; `attention_sizes` has head dims 64 and 128, and one sample at
72; `attention_masks` the other masks, unequal blocks and float32; `attention_single` the rest with one
sample. What is left out when time runs out is the least telling.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ard_kernels import BlockLayout, block_attention, cached_block_attention, use_backend
from ard_kernels.layout import MASKS, Mask
from ard_kernels.tune import check_results
from benchmarks.suite.record import Recorder, backends, compared, compiled, tf32_allowed
from benchmarks.suite.timing import Prepare, sets_beyond_cache

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v (B, queries or keys, H, Dh) -> (B, queries, H, Dh)."""
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k, v, dout."""


PHASES = {"forward": 1.0, "backward": 2.5, "forward + backward": 3.5}
"""And their useful work in units of the forward's."""


@dataclass(frozen=True)
class Shape:
    """B samples of the layout's tokens, H heads of Dh."""

    batch: int
    layout: BlockLayout
    heads: int
    dim: int
    dtype: str = "bfloat16"
    block: int | None = None
    """Of a step with a KV cache: the block that the queries are."""

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(PHASES) if self.block is None else ("forward",)

    def __str__(self) -> str:
        layout = self.layout
        length = str(layout.lengths[0]) if layout.is_uniform else "+".join(map(str, layout.lengths))
        dtype = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        step = "" if self.block is None else f" cached block {self.block}"
        return f"B{self.batch} S{layout.blocks} L{length} H{self.heads} Dh{self.dim}{dtype}{step}"


class Method:
    """A way to compute attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def recorded(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, ...]]]:
        """out, and what computes dq, dk and dv."""
        raise NotImplementedError

    def backward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """The second alone, with dout as it is taken without a copy."""
        return self.recorded(q, k, v, dout)[1]

    def forward_backward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out, backward = self.recorded(q, k, v, dout)
        return out, *backward()


class Whole(Method):
    """One call over all tokens, differentiated by autograd."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)

    def recorded(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, ...]]]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = self.attend(*leaves)
        return out, lambda: torch.autograd.grad(out, leaves, dout)


class PerBlock(Method):
    """One dense call per block of queries, on the keys that it sees.

    Gradients of the keys are summed in place: cheaper than what autograd makes of slices.
    """

    def __init__(self, dense: Attend, layout: BlockLayout, mask: Mask) -> None:
        self.dense, self.layout = dense, layout
        self.ranges = [layout.key_ranges(s, mask) for s in range(layout.blocks)]

    def _pieces(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[list[Tensor]]:
        for s, ranges in enumerate(self.ranges):
            yield [q[:, self.layout.slice(s)], _gathered(k, ranges), _gathered(v, ranges)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([self.dense(*piece) for piece in self._pieces(q, k, v)], 1)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        parts = [x.contiguous() for x in dout.split(self.layout.lengths, 1)]
        return self._recorded(q, k, v, parts)[1]

    def recorded(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, ...]]]:
        return self._recorded(q, k, v, dout.split(self.layout.lengths, 1))

    def _recorded(
        self, q: Tensor, k: Tensor, v: Tensor, douts: Sequence[Tensor]
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, ...]]]:
        pieces = [[x.detach().requires_grad_() for x in piece] for piece in self._pieces(q, k, v)]
        outs = [self.dense(*piece) for piece in pieces]

        def backward() -> tuple[Tensor, ...]:
            leaves = [x for piece in pieces for x in piece]
            grads = torch.autograd.grad(outs, leaves, douts)
            rest = list(zip(self.ranges, grads[1::3], grads[2::3], strict=True))
            if self.ranges[-1] == ((0, self.layout.total),):  # the last block's are the sums to add to
                _, dk, dv = rest.pop()
            else:
                dk, dv = torch.zeros_like(k), torch.zeros_like(v)
            for ranges, dk_s, dv_s in rest:
                lengths = [b - a for a, b in ranges]
                for (a, b), one, other in zip(
                    ranges, dk_s.split(lengths, 1), dv_s.split(lengths, 1), strict=True
                ):
                    dk[:, a:b] += one
                    dv[:, a:b] += other
            return torch.cat(grads[0::3], 1), dk, dv

        return torch.cat(outs, 1), backward


def _gathered(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [x[:, a:b] for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Folded(Whole):
    """Block-diagonal attention as one dense call on B*S samples of L tokens."""

    def __init__(self, dense: Attend, layout: BlockLayout) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            folded = (x.unflatten(1, (layout.blocks, -1)).flatten(0, 1) for x in (q, k, v))
            return dense(*folded).unflatten(0, (-1, layout.blocks)).flatten(1, 2)

        super().__init__(attend)


def decomposed(dense: Attend, shape: Shape, mask: Mask) -> Method:
    """Block attention by calls that know no masks."""
    layout, block = shape.layout, shape.block
    if block is not None:
        seen = layout.key_ranges(block, mask)
        return Whole(lambda q, k, v: dense(q, _gathered(k, seen), _gathered(v, seen)))
    if mask == "diagonal" and layout.is_uniform:
        return Folded(dense, layout)
    return PerBlock(dense, layout, mask)


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
    differentiable: bool = True

    def phases(self, shape: Shape) -> tuple[str, ...]:
        return shape.phases if self.differentiable else ("forward",)


def _ours(shape: Shape, mask: Mask) -> Attend:
    layout, block = shape.layout, shape.block
    if block is not None:
        return lambda q, k, v: cached_block_attention(q, k, v, layout, block, mask)
    return lambda q, k, v: block_attention(q, k, v, layout, mask)


def our_candidate(name: str, shape: Shape, mask: Mask) -> Candidate:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with use_backend(name):
            return _ours(shape, mask)(q, k, v)

    return Candidate(f"ours ({name})", lambda: Whole(attend), ours=True, seconds=3)


def our_candidates(shape: Shape, mask: Mask, device: str) -> list[Candidate]:
    """The one that is chosen by default first."""
    dtype = getattr(torch, shape.dtype)
    names = backends("attention", torch.empty(1, 1, shape.heads, shape.dim, device=device, dtype=dtype))
    return [our_candidate(name, shape, mask) for name in names]


def dense_candidates(shape: Shape, mask: Mask, every_pad: bool = False) -> list[Candidate]:
    """Those without compilation: per block, folded for `diagonal`.

    every_pad: whether cuDNN gets all the paddings of head dim 72, not 128 alone. It makes a plan of a second
    for each shape that it meets, for four blocks and each pad four in inference, four forward, four backward.
    """
    layout, scale = shape.layout, shape.dim**-0.5
    kinds = [("sdpa cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa flash", SDPBackend.FLASH_ATTENTION)]
    pads = [80, 96, 128] if shape.dim == 72 else []
    calls: list[tuple[str, Attend, int | None]] = [
        (f"{name}{f', padded to {pad}' if pad else ''}", partial(_sdpa, kind, scale), pad)
        for name, kind in kinds
        for pad in [None, *(pads if every_pad or kind != SDPBackend.CUDNN_ATTENTION else pads[-1:])]
    ]
    packages = {name: where for name, where in PACKAGES.items() if installed(where[0])}
    calls += [(name, partial(_imported, *where, scale), None) for name, where in packages.items()]
    made = [Candidate(name, partial(decomposed, attend, shape, mask), pad) for name, attend, pad in calls]
    if shape.block is None:
        made.append(Candidate("sdpa dense mask", lambda: Whole(partial(_masked, layout, mask, scale))))
    one_launch = _one_cached if shape.block is not None else _one_launch
    if mask == "causal" and layout.is_uniform:
        made += [
            Candidate(f"{name}, one launch", partial(Whole, partial(one_launch, module, shape, scale)),
                      differentiable=False)
            for name, (module, _) in packages.items() if name != "xformers"
        ]  # fmt: skip
    return made


# Inductor's choice for head dim 128 on Hopper. For other dims it takes 64 x 64 with 4 warps forward, and
# max-autotune does not try this one there, nor loads by TMA, nor queries that are scaled first.
_FLEX_TILE = {
    "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3,
    "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 8, "bwd_num_stages": 3,
}  # fmt: skip
_FLEX_TMA = {**_FLEX_TILE, "USE_TMA": True, "PRESCALE_QK": True}


def flex_settings(shape: Shape, device: str) -> list[dict[str, Any]]:
    """Of `flex_candidate`, the quick ones first and of these the one that is likely to be the fastest."""
    tile = [{"tile": _FLEX_TILE}] if device == "cuda" and shape.dim not in (64, 128) else []
    pad = [{"pad": 128}] if shape.dim == 72 else []
    tma = [{"tile": _FLEX_TMA}] if device == "cuda" else []
    slow: list[dict[str, Any]] = [{"autotune": True}, {"block": 256, "autotune": True}]
    return [*tile, *pad, {}, *tma, {"block": 256}, *slow]


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
    name += ", TMA" if tile and tile.get("USE_TMA") else ""
    build = partial(_flex, shape, mask, device, block, autotune, tile)
    # Compiling forward and backward; tuning compiles six forwards, twice, and 28 backwards.
    return Candidate(name, build, pad, 60 if autotune else 12)


def peers(shape: Shape, mask: Mask, device: str) -> list[Candidate]:
    """All that there are for a shape, in whatever section. In float32 our backends are compared with each
    other alone."""
    if shape.dtype == "float32":
        return []
    flex = [flex_candidate(shape, mask, device, **options) for options in flex_settings(shape, device)]
    return [*dense_candidates(shape, mask, every_pad=True), *(flex if shape.block is None else [])]


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


def _one_launch(module: str, shape: Shape, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every block of queries a sequence of its own, with a length of the cache that its sample shares: the
    block-causal forward in one launch."""
    attend = importlib.import_module(module).flash_attn_with_kvcache
    blocks = shape.layout.blocks
    ends, owner = _sequences(shape.layout, len(q), q.device)
    folded = q.unflatten(1, (blocks, -1)).flatten(0, 1)
    out = attend(folded, k, v, cache_seqlens=ends, cache_batch_idx=owner, softmax_scale=scale)
    return out.unflatten(0, (-1, blocks)).flatten(1, 2)


def _one_cached(module: str, shape: Shape, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The step with a cache that the package has a function for."""
    attend = importlib.import_module(module).flash_attn_with_kvcache
    end = shape.layout.bounds[shape.block + 1]  # type: ignore[operator]
    return attend(q, k, v, cache_seqlens=end, softmax_scale=scale)  # type: ignore[no-any-return]


@functools.cache
def _sequences(layout: BlockLayout, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 (batch * S,): how many keys each block of queries sees, and of which sample."""
    ends = torch.tensor(layout.bounds[1:], dtype=torch.int32, device=device).repeat(batch)
    return ends, torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(layout.blocks)


def _visible(layout: BlockLayout, mask: Mask, device: str) -> Callable[..., Tensor]:
    """FlexAttention's function of a pair of positions."""
    if layout.is_uniform:
        length = layout.lengths[0]

        def owner(i: Tensor) -> Tensor:
            return i // length

    else:
        ids = layout.block_ids(device)

        def owner(i: Tensor) -> Tensor:
            return ids[i]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        query, key = owner(i), owner(j)
        if mask == "causal":
            return key <= query
        if mask == "window":
            return (key == query) | (key == query - 1)
        return (key == query) | (key == 0) if mask == "anchor" else key == query

    return visible


def _flex(
    shape: Shape, mask: Mask, device: str, block: int, autotune: bool, tile: dict[str, int] | None
) -> Method:
    total = shape.layout.total
    visible = _visible(shape.layout, mask, device)
    blocks = create_block_mask(visible, None, None, total, total, device=device, BLOCK_SIZE=block)
    # Every row sees its own block, and what it sees is a single range, or with `anchor` two.
    options = {"ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": mask != "anchor", **(tile or {})}
    mode = {"mode": "max-autotune-no-cudagraphs"} if autotune else {}
    attend = compiled(flex_attention, device, dynamic=False, **mode)
    scale = shape.dim**-0.5

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return attend(*heads_first, block_mask=blocks, scale=scale, kernel_options=options).transpose(1, 2)

    return Whole(call)


def make_inputs(shape: Shape, device: str, seed: int) -> Inputs:
    """q, k and v are slices of a packed qkv, as a model makes them; of a cached step k and v are caches."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device, dtype=getattr(torch, shape.dtype))
    size = (shape.batch, shape.layout.total, shape.heads, shape.dim)
    if shape.block is None:
        q, k, v = draw(shape.batch, shape.layout.total, 3, shape.heads, shape.dim).unbind(2)
    else:
        rows = shape.layout.lengths[shape.block]
        q, k, v = draw(shape.batch, rows, shape.heads, shape.dim), draw(size), draw(size)
    return q, k, v, draw(q.shape)


def padded(inputs: Inputs, shape: Shape, pad: int | None) -> Inputs:
    if pad is None:
        return inputs
    return tuple(F.pad(x, (0, pad - shape.dim)) for x in inputs)  # type: ignore[return-value]


def prepared(method: Method, sets: list[Inputs], phase: str) -> Prepare:
    """The timed call of one phase."""

    def prepare(i: int) -> Callable[[], object]:
        q, k, v, dout = sets[i % len(sets)]
        if phase == "forward + backward":
            return lambda: method.forward_backward(q, k, v, dout)
        if phase == "backward":
            return method.backward(q, k, v, dout)

        def forward() -> object:
            with torch.no_grad():
                return method.forward(q, k, v)

        return forward

    return prepare


_RESULTS = {"forward": slice(0, 1), "backward": slice(1, 4), "forward + backward": slice(0, 4)}


def _exact(inputs: Inputs, shape: Shape, mask: Mask) -> list[Tensor]:
    with use_backend("eager"):
        method = Whole(_ours(shape, mask))
        return [x.detach() for x in method.forward_backward(*(x.float() for x in inputs))]


def _checked(prepare: Prepare, exact: list[Tensor], dim: int, phase: str) -> Prepare:
    """`prepare`, if its results for the first set of inputs are right."""
    got: Any = prepare(0)()
    tensors = got if isinstance(got, tuple) else (got,)
    which = _RESULTS[phase]
    check_results([x.detach()[..., :dim] for x in tensors], exact[which], ("out", "dq", "dk", "dv")[which])
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
    ready: dict[str, dict[str, Prepare]] = {phase: {} for phase in shape.phases}
    for candidate in candidates:
        method = rec.attempt(f"{where} {candidate.name}", candidate.build, candidate.seconds, candidate.ours)
        if method is None:
            continue
        for phase in candidate.phases(shape):
            made = prepared(method, sets[candidate.pad], phase)
            checked = partial(_checked, made, exact, shape.dim, phase)
            prepare = rec.attempt(f"{where} {candidate.name} {phase}", checked, ours=candidate.ours)
            if prepare is None:
                break
            ready[phase][candidate.name] = prepare
    for phase in shape.phases:
        times = rec.measure(f"{where} {phase}", ready[phase])
        if times:
            _record(rec, shape, mask, phase, times)


def _record(rec: Recorder, shape: Shape, mask: Mask, phase: str, times: dict[str, dict[str, float]]) -> None:
    pairs = shape.layout.area(mask, shape.block)
    operations = PHASES[phase] * 4 * shape.dim * pairs * shape.batch * shape.heads
    for time in times.values():
        time["tflops"] = operations / time["ms"] / 1e9
        time["percent"] = rec.settings.percent("matmul", time["tflops"])  # type: ignore[assignment]
    where = f"{shape} {mask}"
    others = [peer.name for peer in peers(shape, mask, rec.device) if phase in peer.phases(shape)]
    line = f"{where} {phase}: " + ", ".join(
        f"{name} {time['ms']:.3f} ms {time['tflops']:.0f} TFLOP/s" for name, time in times.items()
    )
    rec.row(line, shape={**asdict(shape), "layout": shape.layout.lengths}, label=str(shape), mask=mask,
            phase=phase, **compared(rec, where, times, others, PHASES))  # fmt: skip


# (L, B): 32768 tokens a call fill the chip. The most telling first.
_FILLING = ((1024, 8), (256, 32), (4096, 2))


def shapes(quick: bool, dim: int = 72, batch: int | None = None) -> list[Shape]:
    if quick:
        return [Shape(batch or 2, BlockLayout.uniform(2, 16), 2, dim // 24 * 8)]
    return [Shape(batch or b, BlockLayout.uniform(4, length), 16, dim) for length, b in _FILLING]


def cached_shapes(quick: bool) -> list[Shape]:
    """The last of DiT-XL/2's four steps. With one sample the kernel shares the keys out among programs."""
    layout, heads, dim = (
        (BlockLayout.uniform(2, 16), 2, 24) if quick else (BlockLayout.uniform(4, 256), 16, 72)
    )
    return [Shape(batch, layout, heads, dim, block=layout.blocks - 1) for batch in (1, 64)]


Comparison = tuple[Shape, Mask, Callable[[], list[Candidate]]]
"""And the candidates."""


def _run(rec: Recorder, plan: list[Comparison]) -> None:
    for shape, mask, candidates in plan:
        chosen = candidates()
        # 5 seconds for inputs, the reference and the times of what could be built.
        needs = 5 + min((c.seconds for c in chosen if not c.ours), default=0)
        what = f"{shape} {mask}, {len(chosen)} methods"
        rec.attempt(what, partial(compare, rec, shape, mask, chosen), needs)
        torch.compiler.reset()
        if rec.device == "cuda":
            torch.cuda.empty_cache()


def _uncompiled(rec: Recorder, shape: Shape, mask: Mask) -> Comparison:
    """Ours, and all that is not compiled."""
    return shape, mask, lambda: [*our_candidates(shape, mask, rec.device), *dense_candidates(shape, mask)]


def _quick_ones(rec: Recorder, shape: Shape, mask: Mask) -> list[Comparison]:
    """Everything that takes no minute to build; what is not compiled first, and written down before a
    compiler may take too long."""
    found = [_uncompiled(rec, shape, mask)]
    if shape.block is None:
        found.append(_flex_against(rec, shape, mask, **flex_settings(shape, rec.device)[0]))
    return found


def _against(rec: Recorder, shape: Shape, mask: Mask, others: list[Candidate]) -> Comparison:
    """Ours by default against some."""
    return shape, mask, lambda: [*our_candidates(shape, mask, rec.device)[:1], *others]


def _flex_against(rec: Recorder, shape: Shape, mask: Mask = "causal", **options: Any) -> Comparison:
    return _against(rec, shape, mask, [flex_candidate(shape, mask, rec.device, **options)])


def attention(rec: Recorder) -> None:
    for name, (module, _) in PACKAGES.items():
        if not installed(module):
            rec.error(name, "not installed, or its package does not import")
    made = shapes(rec.quick)
    known = {c.name for c in dense_candidates(made[0], "causal")}
    pads = [c for c in dense_candidates(made[0], "causal", every_pad=True) if c.name not in known]
    plan = [_uncompiled(rec, shape, "causal") for shape in [*made, *cached_shapes(rec.quick)]]
    quick = [setting for setting in flex_settings(made[0], rec.device) if _is_quick(setting)]
    plan += [_flex_against(rec, shape, **setting) for setting in quick for shape in made]
    plan += [_against(rec, made[0], "causal", pads)] if pads else []
    _run(rec, plan)


def _is_quick(setting: dict[str, Any]) -> bool:
    """Whether `attention` tries this setting of FlexAttention."""
    return not setting or "pad" in setting or setting.get("tile") is _FLEX_TILE


def attention_tuned(rec: Recorder) -> None:
    """FlexAttention's own search first; last the padding that `attention` may have had no time for."""
    known = flex_settings(shapes(rec.quick)[0], rec.device)
    settings = [setting for setting in known if not _is_quick(setting) or "pad" in setting]
    settings.sort(key=lambda s: (s != {"autotune": True}, "pad" in s))
    settings = settings[:1] if rec.quick else settings
    _run(rec, [_flex_against(rec, shape, **s) for s in settings for shape in shapes(rec.quick)])


def attention_masks(rec: Recorder) -> None:
    first = shapes(rec.quick)[0]
    # The sum is 4 * 1024 again, and no tile divides a block.
    unequal = replace(first, layout=BlockLayout((3, 1, 12) if rec.quick else (100, 300, 1100, 2596)))
    pairs: list[tuple[Shape, Mask]] = [(first, "diagonal"), (unequal, "causal")]
    pairs += [(first, mask) for mask in MASKS if mask not in ("causal", "diagonal")]
    _run(rec, [one for pair in pairs for one in _quick_ones(rec, *pair)])
    wide = replace(first, dtype="float32")
    with tf32_allowed():  # our backends against each other
        _run(rec, [(wide, "causal", lambda: our_candidates(wide, "causal", rec.device))])
    diagonal = [shape for dim in (72, 64, 128) for shape in shapes(rec.quick, dim)][1:]
    _run(rec, [one for shape in diagonal[: 0 if rec.quick else None]
               for one in _quick_ones(rec, shape, "diagonal")])  # fmt: skip


def attention_sizes(rec: Recorder) -> None:
    sizes = [(64, None)] if rec.quick else [(72, 1), (64, None), (128, None)]
    chosen = [shape for dim, batch in sizes for shape in shapes(rec.quick, dim, batch)]
    _run(rec, [one for shape in chosen for one in _quick_ones(rec, shape, "causal")])


def attention_single(rec: Recorder) -> None:
    plan: list[tuple[int, Mask]] = [
        (64, "causal"),
        (128, "causal"),
        *((dim, "diagonal") for dim in (72, 64, 128)),
    ]
    _run(rec, [one for dim, mask in (plan[:1] if rec.quick else plan) for shape in shapes(rec.quick, dim, 1)
               for one in _quick_ones(rec, shape, mask)])  # fmt: skip
