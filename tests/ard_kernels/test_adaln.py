"""adaln, gated_residual and gated_residual_adaln against the float64 reference, and against what they
promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import interpreted, normal, takes

from ard_kernels import BlockLayout, adaln, gated_residual, gated_residual_adaln, reference

pytestmark = pytest.mark.usefixtures("backend")

RAGGED = BlockLayout((3, 1, 6, 4))
UNIFORM = BlockLayout.uniform(blocks=3, length=5)
PER_TOKEN = BlockLayout.uniform(blocks=7, length=1)
PER_SAMPLE = BlockLayout((9,))
LAYOUTS = {"ragged": RAGGED, "uniform": UNIFORM, "per-token": PER_TOKEN, "per-sample": PER_SAMPLE}

# Which tensors each operator takes besides the layout: names of `_inputs`.
_TAKES = {
    "adaln": ("x", "shift", "scale"),
    "gated_residual": ("x", "branch", "gate"),
    "gated_residual_adaln": ("x", "branch", "gate", "shift", "scale"),
}
_OURS: dict[str, Callable[..., Any]] = {
    "adaln": adaln,
    "gated_residual": gated_residual,
    "gated_residual_adaln": gated_residual_adaln,
}
NAMES = tuple(_TAKES)

# Largest error in epsilons of the dtype. Measured over this file's inputs: 2.5, 1.7, 0.75, 0.68.
_UNITS = {torch.float64: 5.0, torch.float32: 3.0, torch.bfloat16: 1.5, torch.float16: 1.5}
DTYPES = tuple(_UNITS)


def _refused(backend: str, dtype: torch.dtype) -> bool:
    """Whether the backend does not take the dtype: then it says so, and has no result to test."""
    if takes(backend, dtype):
        return False
    x, table = torch.zeros(1, 1, 16, dtype=dtype), torch.zeros(1, 1, 16, dtype=dtype)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot be used: a tensor is {dtype}"):
        adaln(x, table, table, BlockLayout((1,)))
    return True


def _inputs(
    name: str,
    layout: BlockLayout,
    batch: int,
    width: int,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Activations, and tables that are slices of one packed (B, S, 6, D) as DiT makes them."""
    packed = normal(batch, layout.blocks, 6, width, dtype=table_dtype, seed=seed)
    x, branch = normal(2, batch, layout.total, width, dtype=dtype, seed=seed + 100)
    shift, scale, gate = packed.unbind(2)[:3]
    tensors = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    return tuple(tensors[label] for label in _TAKES[name])


def _run(operator: Callable[..., Any], inputs: Sequence[Tensor], layout: BlockLayout) -> list[Tensor]:
    """The outputs and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = operator(*leaves, layout)
    outs = out if isinstance(out, tuple) else (out,)
    douts = [normal(*y.shape, dtype=torch.bfloat16, seed=200 + i).to(y.dtype) for i, y in enumerate(outs)]
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, leaves, douts)]


def _dense(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The reference with tables in the dtype of the activations, as an unfused model computes it."""

    def run(*tensors: Any) -> Any:
        *inputs, layout = tensors
        return getattr(reference, name)(*(x.to(dtype) for x in inputs), layout)

    return run


def _check(
    assert_accurate: Callable[..., None], name: str, inputs: Sequence[Tensor], layout: BlockLayout
) -> None:
    dtype = inputs[0].dtype
    got = _run(_OURS[name], inputs, layout)
    exact = _run(getattr(reference, name), [x.double() for x in inputs], layout)
    plain = _run(_dense(name, dtype), inputs, layout)
    # The residual that the norm sees has been rounded to its dtype.
    stored = dtype if name == "gated_residual_adaln" else None
    for kind in {t.dtype for t in got}:
        some = [[t for g, t in zip(got, tensors, strict=True) if g.dtype == kind]
                for tensors in (got, exact, plain)]  # fmt: skip
        coarser = max(kind, stored or kind, key=lambda d: torch.finfo(d).eps)
        assert_accurate(*some, _UNITS[coarser], stored)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(backend: str, assert_accurate: Callable[..., None], name: str) -> None:
    @settings(max_examples=6 if interpreted(backend) else 30)  # the interpreter takes 10 ms for every row
    @given(
        lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
        batch=st.integers(1, 3),
        # Narrower rows can have almost no variance: a bad condition, not a bad kernel.
        width=st.integers(16, 160),
        dtype=st.sampled_from([dtype for dtype in DTYPES if takes(backend, dtype)]),
        wide_tables=st.booleans(),
        strided=st.booleans(),
        seed=st.integers(0, 9),
    )
    def check(
        lengths: list[int],
        batch: int,
        width: int,
        dtype: torch.dtype,
        wide_tables: bool,
        strided: bool,
        seed: int,
    ) -> None:
        if interpreted(backend):
            lengths, batch = [min(n, 12) for n in lengths[:2]], 1
        layout = BlockLayout(lengths)
        table_dtype = torch.promote_types(dtype, torch.float32) if wide_tables else dtype
        inputs = _inputs(name, layout, batch, width, dtype, table_dtype, seed)
        if strided:  # every other element of the activations, tokens before samples in the tables
            first, *tables = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
            inputs = (first.repeat_interleave(2, -1)[..., ::2], *tables)
        _check(assert_accurate, name, inputs, layout)

    check()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_table(
    backend: str, assert_accurate: Callable[..., None], dtype: torch.dtype, layout: BlockLayout, name: str
) -> None:
    if _refused(backend, dtype):
        return
    _check(assert_accurate, name, _inputs(name, layout, 2, 72, dtype, dtype), layout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1152, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_production_width(
    assert_accurate: Callable[..., None], dtype: torch.dtype, width: int, name: str
) -> None:
    layout = BlockLayout((2, 1))
    _check(assert_accurate, name, _inputs(name, layout, 1, width, dtype, dtype), layout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [BlockLayout((150, 3)), BlockLayout((150,))], ids=["ragged", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_blocks(
    assert_accurate: Callable[..., None], dtype: torch.dtype, layout: BlockLayout, name: str
) -> None:
    """Table gradients over more rows than one program sums, a number that no tile divides."""
    _check(assert_accurate, name, _inputs(name, layout, 1, 16, dtype, dtype), layout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
@pytest.mark.parametrize(
    ("dtype", "branch_dtype", "table_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
    ids=["float32 residual", "bfloat16 residual", "three dtypes"],
)
def test_mixed_dtypes(
    backend: str, assert_accurate: Callable[..., None], dtype: torch.dtype, branch_dtype: torch.dtype,
    table_dtype: torch.dtype, layout: BlockLayout, name: str,
) -> None:  # fmt: skip
    """Each gradient has its input's dtype, and that dtype's accuracy."""
    if _refused(backend, dtype):
        return
    inputs = dict(zip(_TAKES[name], _inputs(name, layout, 2, 40, dtype, table_dtype), strict=True))
    if "branch" in inputs:
        inputs["branch"] = inputs["branch"].to(branch_dtype)
    _check(assert_accurate, name, tuple(inputs.values()), layout)


@pytest.mark.parametrize("name", ["adaln", "gated_residual_adaln"])
@pytest.mark.parametrize("wide", ["shift", "scale"])
def test_tables_of_two_dtypes(
    backend: str, assert_accurate: Callable[..., None], name: str, wide: str
) -> None:
    """The gradient of neither is rounded to the other's."""
    inputs = dict(zip(_TAKES[name], _inputs(name, RAGGED, 2, 40, torch.float32, torch.bfloat16), strict=True))
    inputs[wide] = normal(*inputs[wide].shape, seed=7)
    _check(assert_accurate, name, tuple(inputs.values()), RAGGED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, layout: BlockLayout, name: str) -> None:
    """Slices of packed tables and of wider activations give the bits that contiguous tensors give."""
    inputs = _inputs(name, layout, 2, 40, dtype, dtype)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    views[0] = torch.cat([inputs[0], inputs[0]], -1)[..., :40]
    got, expected = (
        _run(_OURS[name], views, layout),
        _run(_OURS[name], [x.contiguous() for x in inputs], layout),
    )
    assert not views[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_hooks_may_give_saved_tensors_other_strides(name: str) -> None:
    inputs = _inputs(name, RAGGED, 2, 40, torch.float32, torch.float32)
    expected = _run(_OURS[name], inputs, RAGGED)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)
    ):
        got = _run(_OURS[name], inputs, RAGGED)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)  # PyTorch's own sums have another order


def test_gradient_reaches_the_packed_table() -> None:
    packed = normal(2, RAGGED.blocks, 6, 24).requires_grad_()
    x = normal(2, RAGGED.total, 24, seed=1)
    dy = normal(*x.shape, seed=2)
    shift, scale = packed.unbind(2)[3:5]
    (got,) = torch.autograd.grad(adaln(x, shift, scale, RAGGED), packed, dy)
    exact = torch.autograd.grad(
        reference.adaln(x.double(), shift.double(), scale.double(), RAGGED), packed, dy.double()
    )
    torch.testing.assert_close(
        got, exact[0], rtol=0, atol=8 * torch.finfo(torch.float32).eps * float(got.abs().max())
    )
    assert got[:, :, [0, 1, 2, 5]].eq(0).all()


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_of_two_outputs_used(assert_accurate: Callable[..., None], dtype: torch.dtype, used: int) -> None:
    """The last layer drops the residual, and nothing forbids dropping y."""

    def gradients(operator: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = operator(*leaves, RAGGED)[used]
        dout = normal(*out.shape, dtype=torch.bfloat16, seed=3).to(out.dtype)
        grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
        return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]

    inputs = _inputs("gated_residual_adaln", RAGGED, 2, 24, dtype, dtype)
    got, plain = gradients(gated_residual_adaln, inputs), gradients(reference.gated_residual_adaln, inputs)
    exact = gradients(reference.gated_residual_adaln, [x.double() for x in inputs])
    assert_accurate(got, exact, plain, _UNITS[dtype])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fused_operator_normalises_what_it_stores(
    backend: str, dtype: torch.dtype, layout: BlockLayout
) -> None:
    if _refused(backend, dtype):
        return
    x, branch, gate, shift, scale = _inputs("gated_residual_adaln", layout, 2, 40, dtype, dtype)
    residual, y = gated_residual_adaln(x, branch, gate, shift, scale, layout)
    assert torch.equal(residual, gated_residual(x, branch, gate, layout))
    assert torch.equal(y, adaln(residual, shift, scale, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_residual_is_rounded_to_nearest_even(backend: str, dtype: torch.dtype) -> None:
    """To bfloat16, from values of which every other one is a tie, and from the largest and the smallest."""
    if _refused(backend, dtype):
        return
    steps = 1 + torch.arange(2**10, dtype=torch.float32) * 2.0**-9
    branch = torch.cat([steps, -steps, torch.tensor([torch.finfo(dtype).max, torch.inf, -torch.inf])])
    branch = branch.to(dtype).view(1, 1, -1)
    x, gate = torch.zeros_like(branch, dtype=torch.bfloat16), torch.ones_like(branch)
    assert torch.equal(gated_residual(x, branch, gate, BlockLayout((1,))), branch.bfloat16())


@pytest.mark.parametrize("constant", [0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_rows_give_shift(backend: str, dtype: torch.dtype, constant: float) -> None:
    """Zero variance: LN is 0, eps keeps it finite, and every gradient with it."""
    if _refused(backend, dtype):
        return
    _, shift, scale = _inputs("adaln", RAGGED, 2, 64, dtype, dtype)
    x = torch.full((2, RAGGED.total, 64), constant, dtype=dtype)
    y, *grads = _run(adaln, (x, shift, scale), RAGGED)
    # PyTorch's half-precision layer norm is x * rstd - mean * rstd in float32, and rstd is 1000 here.
    slack = 2 * 1000 * constant * torch.finfo(torch.float32).eps if torch.finfo(dtype).bits == 16 else 0.0
    torch.testing.assert_close(
        y, reference.expand(shift, RAGGED), rtol=torch.finfo(dtype).eps if slack else 0, atol=slack
    )
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[2].eq(0).all()


def test_rows_far_from_zero() -> None:
    """Mean 1000, deviation 1: one pass of E[x^2] - E[x]^2 in float32 would be off by 6 % of the variance."""
    shift, scale = torch.zeros(2, 1, RAGGED.blocks, 64)
    x = 1000 + normal(1, RAGGED.total, 64)
    exact = reference.adaln(x.double(), shift.double(), scale.double(), RAGGED)
    # The rounded mean alone moves x - mean by up to half a spacing of float32 at 1000.
    assert (adaln(x, shift, scale, RAGGED) - exact).abs().max() <= 2 * 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("size", [1e-4, 1e4, 1e18])
def test_rows_of_any_size(size: float) -> None:
    """Up to where the sum of squares overflows float32."""
    shift, scale = torch.zeros(2, 1, RAGGED.blocks, 64)
    x = size * normal(1, RAGGED.total, 64)
    exact = reference.adaln(x.double(), shift.double(), scale.double(), RAGGED)
    assert (adaln(x, shift, scale, RAGGED) - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * 4


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("name", "label"), [(name, label) for name in NAMES for label in _TAKES[name]])
def test_what_is_not_finite_shows_where_the_reference_shows_it(name: str, label: str, bad: float) -> None:
    inputs = _inputs(name, RAGGED, 2, 24, torch.float32, torch.float32)
    inputs = tuple(t.contiguous() for t in inputs)
    inputs[_TAKES[name].index(label)][1, 2, 5] = bad
    got, expected = _run(_OURS[name], inputs, RAGGED), _run(getattr(reference, name), inputs, RAGGED)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g.isfinite(), e.isfinite())


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_eps_is_inside_the_root(backend: str, dtype: torch.dtype, eps: float) -> None:
    if _refused(backend, dtype):
        return
    shift, scale = torch.zeros(2, 1, 1, 2, dtype=dtype)
    x = torch.tensor([[[-1.0, 1.0]]], dtype=dtype)
    y = adaln(x, shift, scale, BlockLayout((1,)), eps)
    torch.testing.assert_close(y, x / (1 + eps) ** 0.5, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_an_empty_batch(layout: BlockLayout, name: str) -> None:
    inputs = _inputs(name, layout, 0, 24, torch.float32, torch.bfloat16)
    outs = _run(_OURS[name], inputs, layout)
    wanted = [inputs[0]] * (len(outs) - len(inputs)) + list(inputs)
    assert [(t.shape, t.dtype) for t in outs] == [(t.shape, t.dtype) for t in wanted]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bitwise_equal(backend: str, dtype: torch.dtype, name: str) -> None:
    if _refused(backend, dtype):
        return
    layout = BlockLayout((20, 9) if interpreted(backend) else (40, 64, 24))
    inputs = _inputs(name, layout, 2, 72, dtype, dtype)
    first, second = _run(_OURS[name], inputs, layout), _run(_OURS[name], inputs, layout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("table_dtype", "layout"),
    [(torch.bfloat16, BlockLayout((2, 1))), (torch.float32, BlockLayout((2, 2)))],
    ids=["bfloat16, ragged", "float32, uniform"],
)
def test_opcheck(backend: str, table_dtype: torch.dtype, layout: BlockLayout) -> None:
    ops = torch.ops.ard_kernels
    dtype, end = torch.bfloat16, (layout.runs, backend)
    x, branch, gate, shift, scale = _inputs("gated_residual_adaln", layout, 2, 16, dtype, table_dtype)
    lx, lbranch, lgate, lshift, lscale = (
        t.detach().requires_grad_() for t in (x, branch, gate, shift, scale)
    )
    options = (layout.runs, 1e-6, dtype, backend)
    check = torch.library.opcheck
    check(ops.adaln.default, (lx, lshift, lscale, *options))
    check(ops.gated_residual.default, (lx, lbranch, lgate, *end))
    check(ops.gated_residual_adaln.default, (lx, lbranch, lgate, lshift, lscale, *options))
    _, mean, rstd = ops.adaln(x, shift, scale, *options)
    check(ops.adaln_backward.default, (branch, None, x, scale, mean, rstd, *end))
    check(ops.adaln_backward.default, (branch, branch, x, scale, mean, rstd, *end))
    check(ops.gated_residual_backward.default, (x, branch, gate, *end))
    check(
        ops.gated_residual_adaln_backward.default, (branch, branch, x, branch, gate, scale, mean, rstd, *end)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_compiles_without_graph_breaks(layout: BlockLayout, name: str) -> None:
    torch._dynamo.reset()
    inputs = _inputs(name, layout, 2, 24, torch.float32, torch.float32)
    compiled = torch.compile(_OURS[name], fullgraph=True, backend="aot_eager")
    got, expected = _run(compiled, inputs, layout), _run(_OURS[name], inputs, layout)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_autocast_keeps_the_residual_and_narrows_y(layout: BlockLayout) -> None:
    """y goes to a linear layer that would cast it; the residual stream stays float32, with a bfloat16
    branch."""
    x, branch, gate, shift, scale = _inputs(
        "gated_residual_adaln", layout, 2, 24, torch.float32, torch.float32
    )
    inputs = (x, branch.bfloat16(), gate, shift, scale)
    exact, exact_y = reference.gated_residual_adaln(*(t.double() for t in inputs), layout)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        residual, y, *grads = _run(gated_residual_adaln, inputs, layout)
        plain_y = adaln(residual, shift, scale, layout)
        plain_residual = gated_residual(*inputs[:3], layout)
    assert (residual.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    assert [grad.dtype for grad in grads] == [t.dtype for t in inputs]
    assert torch.equal(residual, plain_residual)
    assert torch.equal(y, plain_y)
    eps = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16)}
    # One rounding to bfloat16 is half an epsilon of the value; arithmetic before it is float32.
    assert (residual - exact).abs().max() <= 2 * eps[torch.float32] * exact.abs().max()
    assert (
        (y - exact_y).abs() <= 0.5001 * eps[torch.bfloat16] * exact_y.abs() + 16 * eps[torch.float32]
    ).all()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_known_without_data(name: str) -> None:
    inputs = [t.to("meta") for t in _inputs(name, RAGGED, 2, 24, torch.bfloat16, torch.float32)]
    out = _OURS[name](*inputs, RAGGED)
    for y in out if isinstance(out, tuple) else (out,):
        assert (y.shape, y.dtype, y.device) == (inputs[0].shape, torch.bfloat16, torch.device("meta"))


_GOOD = dict(
    zip(
        _TAKES["gated_residual_adaln"],
        _inputs("gated_residual_adaln", RAGGED, 2, 16, torch.float32, torch.float32),
        strict=True,
    )
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": _GOOD["x"][0]}, r"x has shape \(14, 16\), accepted is \(B, 14, D\)"),
        ({"x": _GOOD["x"][:, 1:]}, r"x has shape \(2, 13, 16\), accepted is \(B, 14, D\) \(4 blocks"),
        ({"x": _GOOD["x"].int()}, r"x is torch.int32, accepted are torch.float64"),
        ({"layout": (3, 1, 6, 4)}, r"layout is tuple, accepted is BlockLayout"),
        ({"branch": _GOOD["branch"][..., :8]}, r"branch has shape \(2, 14, 8\), x has \(2, 14, 16\)"),
        ({"branch": _GOOD["branch"].long()}, r"branch is torch.int64, accepted are"),
        ({"branch": _GOOD["branch"].to("meta")}, r"branch is on meta, x is on cpu"),
        *[
            case
            for label in ("gate", "shift", "scale")
            for case in (
                ({label: _GOOD[label][:, :3]}, rf"{label} has shape \(2, 3, 16\), accepted is \(2, 4, 16\)"),
                ({label: _GOOD[label][:, :1]}, r".*a row per block; for a row per token or sample"),
                ({label: _GOOD[label][:1]}, rf"{label} has shape \(1, 4, 16\), accepted is \(2, 4, 16\)"),
                ({label: _GOOD[label][:, 0]}, rf"{label} has shape \(2, 16\), accepted is \(2, 4, 16\)"),
                ({label: _GOOD[label].bool()}, rf"{label} is torch.bool, accepted are"),
                ({label: _GOOD[label].to("meta")}, rf"{label} is on meta, x is on cpu"),
            )
        ],
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    """Each operator that takes the argument names it, and itself."""
    for name, labels in _TAKES.items():
        (changed,) = change
        if changed != "layout" and changed not in labels:
            continue
        arguments = {label: _GOOD[label] for label in labels}
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            _OURS[name](**{**arguments, "layout": RAGGED, **change})


@pytest.mark.parametrize("eps", [-1e-6, torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["adaln", "gated_residual_adaln"])
def test_a_bad_eps_is_named(name: str, eps: float) -> None:
    arguments = {label: _GOOD[label] for label in _TAKES[name]}
    with pytest.raises(ValueError, match=f"^{name}: eps is {eps}, accepted is a finite number >= 0$"):
        _OURS[name](**arguments, layout=RAGGED, eps=eps)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused_by_name(name: str) -> None:
    leaves = [x.detach().requires_grad_() for x in _inputs(name, RAGGED, 1, 16, torch.float32, torch.float32)]
    out = _OURS[name](*leaves, RAGGED)
    total = sum(y.square().sum() for y in (out if isinstance(out, tuple) else (out,)))
    gradients = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"^{name}: is differentiated twice, accepted is once"):
        sum(g.sum() for g in gradients).backward()  # type: ignore[union-attr,no-untyped-call]
