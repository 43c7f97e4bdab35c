"""GELU of every backend against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from variants import normal, takes

from ard_kernels import gelu, reference, use_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _run(operator: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = operator(x)
    return [out.detach(), *torch.autograd.grad(out, x, dout.to(out.dtype))]


def _check(backend: str, assert_accurate: Callable[..., None], x: Tensor, dout: Tensor) -> None:
    exact = _run(reference.gelu, x.double(), dout)
    # PyTorch's own gradient is up to 7.7 epsilons off where u is large.
    units = 3.0 if backend == "native" else 9.0
    assert_accurate(_run(gelu, x, dout), exact, _run(reference.gelu, x, dout), units)


@given(
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 9),
)
def test_values_and_gradients(
    backend: str, assert_accurate: Callable[..., None], shape: list[int], dtype: torch.dtype, size: float,
    seed: int,
) -> None:  # fmt: skip
    assume(takes("eager" if backend == "triton" else backend, dtype))
    x, dout = (normal(*shape, dtype=dtype, seed=s) for s in (seed, seed + 100))
    _check(backend, assert_accurate, x * size, dout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_region_of_the_curve(
    backend: str, assert_accurate: Callable[..., None], dtype: torch.dtype
) -> None:
    """From where it is 0 to where it is x, and the small numbers around 0."""
    wide = torch.linspace(-20, 20, 40001).to(dtype)
    x = torch.cat([wide, wide * 1e-3, wide * 1e-30])
    _check(backend, assert_accurate, x, torch.ones_like(x))


def test_small_results_of_the_kernel_keep_their_digits() -> None:
    """Left of -4 the tanh form cancels; s itself does not."""
    x = torch.linspace(-6, -2, 1001, dtype=torch.float32)
    u = (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)
    exact = x.double() / (1 + torch.exp(-2 * u))
    # exp(2 u) multiplies the error of 2 u, which is up to 19 of its half epsilons.
    with use_backend("native"):
        y = gelu(x)
    assert ((y.double() - exact) / exact).abs().max() <= 40 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes_are_those_of_the_reference(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor(
        [float("inf"), float("-inf"), float("nan"), 1e20, -1e20, 3e38, -3e38, 50, -50, 0.0, -0.0],
        dtype=dtype,
    )
    got, dx = _run(gelu, x, torch.ones_like(x))
    exact, exact_dx = _run(reference.gelu, x.double(), torch.ones_like(x))
    torch.testing.assert_close(got.double(), exact, equal_nan=True, rtol=1e-6, atol=1e-20)
    # PyTorch's own float gradient is NaN where x^3 is infinite: only ours has to be finite there.
    if backend == "native":
        torch.testing.assert_close(dx.double(), exact_dx, equal_nan=True, rtol=1e-6, atol=1e-20)


def test_a_nan_gradient_stays_and_touches_nothing_else(backend: str) -> None:
    x, dout = normal(2, 100).unbind(0)
    dout[[3, 70]] = torch.tensor([float("nan"), float("inf")], device=dout.device)
    _, dx = _run(gelu, x, dout)
    assert (~dx.isfinite()).nonzero().flatten().tolist() == [3, 70]


@pytest.mark.parametrize("view", [lambda x: x.transpose(0, 1), lambda x: x[:, ::3], lambda x: x[:0]],
                         ids=["transposed", "every third", "empty"])  # fmt: skip
def test_any_strides(backend: str, view: Callable[[Tensor], Tensor]) -> None:
    x, dout = (view(x) for x in normal(2, 30, 33).unbind(0))
    copied = _run(gelu, x.contiguous(), dout.contiguous())
    for got, expected in zip(_run(gelu, x, dout), copied, strict=True):
        if backend == "native":
            assert torch.equal(got, expected)
        torch.testing.assert_close(got, expected)  # PyTorch's bits depend on strides


def test_an_expanded_gradient(backend: str) -> None:
    x = normal(5, 7).requires_grad_()
    (dx,) = torch.autograd.grad(gelu(x).sum(), x)
    assert torch.equal(dx, _run(gelu, x, torch.ones_like(x))[1])


def test_compiles_without_graph_breaks(backend: str) -> None:
    torch._dynamo.reset()
    x, dout = normal(2, 9, 24).unbind(0)
    compiled = torch.compile(gelu, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(_run(compiled, x, dout), _run(gelu, x, dout), strict=True))


def test_registration_of_the_kernel() -> None:
    x, dout = normal(2, 3, 8).unbind(0)
    torch.library.opcheck(torch.ops.ard_kernels.gelu.default, (x.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.ard_kernels.gelu_backward.default, (dout, x))


def test_shapes_are_known_without_data() -> None:
    x = torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
    y = gelu(x)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


def test_other_dtypes_are_pytorchs_and_demanding_the_kernel_for_them_is_an_error() -> None:
    x = normal(50, dtype=torch.float16)
    assert torch.equal(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"))
    message = "gelu: backend 'native' cannot be used: a tensor is torch.float16, accepted are torch.float32"
    with use_backend("native"), pytest.raises(ValueError, match=f"^{message}"):
        gelu(x)


def test_a_bad_argument_is_named() -> None:
    with pytest.raises(ValueError, match=r"^gelu: x is torch\.int64, accepted are floating dtypes"):
        gelu(torch.arange(3))


def test_unusual_tensors_are_pytorchs() -> None:
    """Which takes them, or says why not."""
    parts = [normal(2, 8), normal(5, 8, seed=1)]
    for layout in (torch.jagged, torch.strided):
        x = torch.nested.nested_tensor(parts, layout=layout)
        for got, wanted in zip(gelu(x).unbind(), parts, strict=True):
            torch.testing.assert_close(got, torch.nn.functional.gelu(wanted, approximate="tanh"))
    with use_backend("native"), pytest.raises(ValueError, match="x is nested, accepted are strided tensors"):
        gelu(x)
    two = TwoTensor(normal(3), normal(3, seed=1))
    with use_backend("native"), pytest.raises(ValueError, match="x is a TwoTensor, accepted are plain"):
        gelu(two)
    torch.testing.assert_close(gelu(two).b, torch.nn.functional.gelu(two.b, approximate="tanh"))


def test_a_second_derivative_is_refused_by_name() -> None:
    x = normal(3).requires_grad_()
    with use_backend("native"):
        (dx,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^gelu: is differentiated twice"):
        dx.sum().backward()  # type: ignore[no-untyped-call]
