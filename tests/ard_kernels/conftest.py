"""How closely an operator must follow the float64 reference, and memory that shows what was never written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from ard_kernels import use_backend
from ard_kernels.backends import native

# The same examples in every run: a failure is a failure of the code, not of the day.
settings.register_profile("ard_kernels", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("ard_kernels")


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: a row that a kernel forgets to write cannot pass."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _assert_accurate(
    got: Sequence[Tensor],
    exact: Sequence[Tensor],
    plain: Sequence[Tensor],
    units: float,
    stored: torch.dtype | None = None,
    terms: float | Sequence[float] = 0.0,
) -> None:
    """Each tensor of `got` against `exact` (float64) and against `plain`, the dense composition in its dtype.

    The largest error is at most `units` machine epsilons of the largest exact value, or of 1 where that is
    smaller: inputs are unit normal, so 1 is the size of the terms that cancel to a small result. An operator
    that rounds an intermediate result to `stored` has that dtype's epsilon where it is the larger one.

    Below float64 the root mean square error is at most 1.5 times that of `plain`, in float32 3 times (the
    backward's weights are exp(score - lse), a difference of rounded numbers), or what rounding costs anyway,
    in epsilons of the exact result's root mean square: half of one in half precision, 3 in float32, 4 where
    an intermediate result is stored otherwise. Where `terms` of a size cancel to a smaller result, their size
    counts, for all tensors or per tensor: with a single visible key the gradients of q and k are zero.
    """
    assert len(got) == len(exact) == len(plain)
    sizes = [float(terms)] * len(got) if isinstance(terms, int | float) else terms
    for i, (g, e, p, term) in enumerate(zip(got, exact, plain, sizes, strict=True)):
        assert g.shape == e.shape
        assert g.dtype == p.dtype
        assert e.dtype == torch.float64
        eps = max(torch.finfo(dtype).eps for dtype in (g.dtype, stored or g.dtype))
        unit = eps * max(float(e.abs().max()), 1.0)
        error, dense = (g.double() - e) / unit, (p.double() - e) / unit
        largest = float(error.abs().max())
        rms, dense_rms = (float(x.square().mean().sqrt()) for x in (error, dense))
        assert largest <= units, f"tensor {i}: error {largest:.2f} eps, allowed {units}"
        if g.dtype != torch.float64:
            size = max(float(e.square().mean().sqrt()), term) * eps / unit
            wide = g.dtype == torch.float32
            anyway = 4.0 if stored not in (None, g.dtype) else 3.0 if wide else 0.5
            allowed = max((3.0 if wide else 1.5) * dense_rms, anyway * size)
            assert rms <= allowed, (
                f"tensor {i}: rms {rms:.3f} eps, allowed {allowed:.3f} (dense composition {dense_rms:.3f})"
            )


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[..., None]:
    return _assert_accurate


# Without a GPU, Triton's kernels are interpreted on CPU tensors; with one, they are compiled. Triton exists
# for Linux alone; there a missing Triton fails the tests.
_INTERPRETED = ["triton"] if sys.platform == "linux" and not torch.cuda.is_available() else []
_COMPILED = pytest.param("triton on cuda", marks=pytest.mark.gpu)


@contextlib.contextmanager
def _in_force(variant: str) -> Iterator[str]:
    """A backend, with its device for new tensors, or with the instruction set of the compiled kernels."""
    backend, _, device = variant.partition(" on ")
    name, _, instruction_set = backend.partition(" with ")
    if instruction_set:
        assert native.C is not None
        before = native.C.instruction_set()  # the best, or what ARD_KERNELS_ISA names
        native.C.use_instruction_set(instruction_set)
    precision = torch.get_float32_matmul_precision()
    torch.set_default_device(device or None)  # not "cpu", a mode that torch.compile must trace
    if name == "triton":
        torch.set_float32_matmul_precision("high")  # its condition for float32
    try:
        with use_backend(name):
            yield name
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_device(None)
        if instruction_set:
            native.C.use_instruction_set(before)


@pytest.fixture(
    scope="module",
    params=[
        "eager",
        "native",
        *_INTERPRETED,
        pytest.param("eager on cuda", marks=pytest.mark.gpu),
        _COMPILED,
    ],
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests once for every backend; tensors are made on its device."""
    with _in_force(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def _nothing_in_force(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a test that asks for no variant: the last one of its module stays until the module ends."""
    if {"backend", "compiled", "fused", "triton"} & set(request.fixturenames):
        yield
        return
    monkeypatch.setattr(sys.modules[use_backend.__module__], "_forced", [])
    device = torch.get_default_device()
    torch.set_default_device(None)
    yield
    torch.set_default_device(None if device.type == "cpu" else device)


# Where they were not built, the tests of "native" fail and say so.
_INSTRUCTION_SETS = [
    f"native with {name}" for name in ([] if native.C is None else native.C.instruction_sets())
]


@pytest.fixture(scope="module", params=_INSTRUCTION_SETS)
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module's tests with the compiled kernels of every instruction set that this processor has."""
    with _in_force(request.param):
        yield


@pytest.fixture(scope="module", params=[*_INSTRUCTION_SETS, *_INTERPRETED, _COMPILED])
def fused(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module's tests with every backend that does not compose PyTorch's operators."""
    with _in_force(request.param):
        yield


@pytest.fixture(scope="module", params=[*_INTERPRETED, _COMPILED])
def triton(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module's tests with the Triton kernels."""
    with _in_force(request.param):
        yield
