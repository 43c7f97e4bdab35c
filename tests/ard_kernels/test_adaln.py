"""adaln, gated_residual and gated_residual_adaln against the float64 reference, and against what they
promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ard_kernels import BlockLayout, adaln, gated_residual, gated_residual_adaln, reference

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


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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
    packed = _normal(batch, layout.blocks, 6, width, dtype=table_dtype, seed=seed)
    x, branch = _normal(2, batch, layout.total, width, dtype=dtype, seed=seed + 100)
    shift, scale, gate = packed.unbind(2)[:3]
    tensors = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    return tuple(tensors[label] for label in _TAKES[name])


def _run(operator: Callable[..., Any], inputs: Sequence[Tensor], layout: BlockLayout) -> list[Tensor]:
    """The outputs and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = operator(*leaves, layout)
    outs = out if isinstance(out, tuple) else (out,)
    douts = [_normal(*y.shape, dtype=torch.bfloat16, seed=200 + i).to(y.dtype) for i, y in enumerate(outs)]
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
    assert_accurate(got, exact, plain, _UNITS[dtype], stored)


@pytest.mark.parametrize("name", NAMES)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    batch=st.integers(1, 3),
    # Narrower rows can have almost no variance: a bad condition, not a bad kernel.
    width=st.integers(16, 160),
    dtype=st.sampled_from(DTYPES),
    wide_tables=st.booleans(),
    seed=st.integers(0, 9),
)
def test_values_and_gradients(
    assert_accurate: Callable[..., None], name: str, lengths: list[int], batch: int, width: int,
    dtype: torch.dtype,
    wide_tables: bool, seed: int,
) -> None:  # fmt: skip
    layout = BlockLayout(lengths)
    table_dtype = torch.promote_types(dtype, torch.float32) if wide_tables else dtype
    inputs = _inputs(name, layout, batch, width, dtype, table_dtype, seed)
    _check(assert_accurate, name, inputs, layout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_table(
    assert_accurate: Callable[..., None], dtype: torch.dtype, layout: BlockLayout, name: str
) -> None:
    _check(assert_accurate, name, _inputs(name, layout, 2, 72, dtype, dtype), layout)


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


def test_gradient_reaches_the_packed_table() -> None:
    packed = _normal(2, RAGGED.blocks, 6, 24).requires_grad_()
    x = _normal(2, RAGGED.total, 24, seed=1)
    dy = _normal(*x.shape, seed=2)
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
        dout = _normal(*out.shape, dtype=torch.bfloat16, seed=3).to(out.dtype)
        grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
        return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]

    inputs = _inputs("gated_residual_adaln", RAGGED, 2, 24, dtype, dtype)
    got, plain = gradients(gated_residual_adaln, inputs), gradients(reference.gated_residual_adaln, inputs)
    exact = gradients(reference.gated_residual_adaln, [x.double() for x in inputs])
    assert_accurate(got, exact, plain, _UNITS[dtype])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fused_operator_normalises_what_it_stores(dtype: torch.dtype, layout: BlockLayout) -> None:
    x, branch, gate, shift, scale = _inputs("gated_residual_adaln", layout, 2, 40, dtype, dtype)
    residual, y = gated_residual_adaln(x, branch, gate, shift, scale, layout)
    assert torch.equal(residual, gated_residual(x, branch, gate, layout))
    assert torch.equal(y, adaln(residual, shift, scale, layout))


@pytest.mark.parametrize("constant", [0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_rows_give_shift(dtype: torch.dtype, constant: float) -> None:
    """Zero variance: LN is 0, eps keeps it finite, and every gradient with it."""
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
    x = 1000 + _normal(1, RAGGED.total, 64)
    exact = reference.adaln(x.double(), shift.double(), scale.double(), RAGGED)
    # The rounded mean alone moves x - mean by up to half a spacing of float32 at 1000.
    assert (adaln(x, shift, scale, RAGGED) - exact).abs().max() <= 2 * 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps_is_inside_the_root(eps: float) -> None:
    shift, scale = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    x = torch.tensor([[[-1.0, 1.0]]], dtype=torch.float64)
    y = adaln(x, shift, scale, BlockLayout((1,)), eps)
    torch.testing.assert_close(y, x / (1 + eps) ** 0.5, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bitwise_equal(dtype: torch.dtype, name: str) -> None:
    layout = BlockLayout((40, 64, 24))
    inputs = _inputs(name, layout, 2, 72, dtype, dtype)
    first, second = _run(_OURS[name], inputs, layout), _run(_OURS[name], inputs, layout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(table_dtype: torch.dtype, layout: BlockLayout) -> None:
    ops = torch.ops.ard_kernels
    dtype, end = torch.bfloat16, (layout.lengths, "eager")
    x, branch, gate, shift, scale = _inputs("gated_residual_adaln", layout, 2, 16, dtype, table_dtype)
    lx, lbranch, lgate, lshift, lscale = (
        t.detach().requires_grad_() for t in (x, branch, gate, shift, scale)
    )
    options = (layout.lengths, 1e-6, dtype, "eager")
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
    with torch.autocast("cpu", torch.bfloat16):
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
