"""Which backend is in force, and that an impossible choice is an error that says why."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ard_kernels
from ard_kernels import BlockLayout, block_attention, reference, use_backend
from ard_kernels.backends import _warn, choose, forced


def test_every_backend_is_listed_with_a_reason() -> None:
    found = ard_kernels.backends()
    assert {"eager", "native", "triton"} <= set(found)
    assert found["eager"].available
    assert all(status.reason for status in found.values())


def test_use_backend_nests_and_ends() -> None:
    before = forced()
    with use_backend("eager"):
        assert forced() == "eager"
        with use_backend("eager"):
            assert forced() == "eager"
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert forced() == before


def test_every_available_backend_can_be_forced() -> None:
    layout = BlockLayout((2, 3))
    for name, status in ard_kernels.backends().items():
        if status.available:
            device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
            q = torch.ones(1, 5, 1, 16, dtype=torch.bfloat16, device=device)
            with use_backend(name):
                assert forced() == name
                assert torch.equal(block_attention(q, q, q, layout), q)


def test_unknown_backend_is_named() -> None:
    before = forced()
    with (
        pytest.raises(ValueError, match=r"^use_backend: backend is 'fast', accepted are 'eager'"),
        use_backend("fast"),
    ):
        pytest.fail("the block ran")
    assert forced() == before


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process without a GPU and without Triton's interpreter: there Triton is absent."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _imported_with(backend: str) -> subprocess.CompletedProcess[str]:
    return _python("from ard_kernels.backends import forced; print(forced())", ARD_KERNELS_BACKEND=backend)


def test_absent_backend_says_why() -> None:
    done = _python(
        "from ard_kernels import backends, use_backend\n"
        "print(backends()['triton'].reason)\n"
        "with use_backend('triton'): print('the block ran')"
    )
    reason = done.stdout.strip()
    assert reason
    assert done.stderr.endswith(
        f"RuntimeError: use_backend: backend 'triton' cannot be used here: {reason}\n"
    )


def test_environment_variable_chooses() -> None:
    assert _imported_with("eager").stdout == "eager\n"


def test_environment_variable_unknown_backend_is_named() -> None:
    done = _imported_with("fast")
    assert done.returncode != 0
    assert (
        "ValueError: environment variable ARD_KERNELS_BACKEND: backend is 'fast', accepted are" in done.stderr
    )


def test_environment_variable_absent_backend_says_why() -> None:
    done = _imported_with("triton")
    assert done.returncode != 0
    assert "environment variable ARD_KERNELS_BACKEND: backend 'triton' cannot be used here: " in done.stderr


def test_environment_variable_unknown_instruction_set_is_named() -> None:
    done = _python("import ard_kernels", ARD_KERNELS_ISA="mmx")
    assert done.returncode != 0
    assert "environment variable ARD_KERNELS_ISA is 'mmx', accepted here are" in done.stderr


_LAYOUT = BlockLayout((2, 3))
_X, _TABLE = torch.ones(1, 5, 16), torch.ones(1, 2, 16)
_ONE_ARGUMENT: dict[str, Callable[[ModuleType], Callable[[Tensor], Tensor]]] = {
    "block_attention": lambda f: (
        lambda x: f.block_attention(*[x.unflatten(-1, (1, 16))] * 3, _LAYOUT, scale=0.1)
    ),
    "cached_block_attention": lambda f: (
        lambda x: f.cached_block_attention(x[:, 2:].unsqueeze(2), *[x.unsqueeze(2)] * 2, _LAYOUT, 1)
    ),
    "adaln": lambda f: lambda x: f.adaln(x.cumsum(-1), _TABLE, _TABLE, _LAYOUT),
    "gated_residual": lambda f: lambda x: f.gated_residual(_X, x, _TABLE, _LAYOUT),
    "gated_residual_adaln": lambda f: (
        lambda x: f.gated_residual_adaln(_X, x.cumsum(-1), *[_TABLE] * 3, _LAYOUT)[1]
    ),
    "gelu": lambda f: f.gelu,
}


@pytest.mark.parametrize(
    ("operator", "backend"),
    [(o, b) for o in _ONE_ARGUMENT for b in ("eager", "native") if (o, b) != ("gelu", "eager")],
)
def test_forward_mode_differentiation_is_refused_and_not_zero(operator: str, backend: str) -> None:
    """An operator with a backward alone passes for a constant there; the reference says what is lost."""
    ours, theirs = (_ONE_ARGUMENT[operator](module) for module in (ard_kernels, reference))
    x = torch.linspace(-1, 1, _X.numel()).view_as(_X)
    _, wanted = torch.func.jvp(theirs, (x,), (x * x,))
    assert wanted.abs().max() > 1e-3
    with use_backend(backend):
        with pytest.raises(NotImplementedError, match=rf"^{operator}: an argument has a tangent .*reference"):
            torch.func.jvp(ours, (x,), (x * x,))
        # What does not depend on the variable is a constant indeed.
        _, tangent = torch.func.jvp(lambda y: y.sum() * ours(x).sum(), (x,), (x,))
        assert tangent == x.sum() * ours(x).sum()


@pytest.mark.parametrize(
    ("operator", "backend"),
    [(o, b) for o in _ONE_ARGUMENT for b in ("eager", "native") if (o, b) != ("gelu", "eager")],
)
def test_differentiation_by_torch_func_is_refused_by_name(operator: str, backend: str) -> None:
    ours = _ONE_ARGUMENT[operator](ard_kernels)
    with use_backend(backend):
        for transformed in (
            torch.func.grad(lambda x: ours(x).sum()),
            torch.func.grad(lambda x: torch.vmap(ours)(x.unsqueeze(0)).sum()),
            torch.func.jacrev(ours),
        ):
            with pytest.raises(
                NotImplementedError, match=rf"^{operator}: is differentiated by torch\.func .*ref"
            ):
                transformed(_X)


class _Stop(torch.autograd.Function):
    """The identity, whose backward returns no gradient at all instead of zeros."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(*_: Any) -> None:
        return None


@pytest.mark.parametrize("operator", sorted(_ONE_ARGUMENT.keys() - {"cached_block_attention"}))
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_where_no_gradient_arrives_none_is_made(operator: str, backend: str) -> None:
    x = torch.linspace(-1, 1, _X.numel()).view_as(_X).requires_grad_()
    with use_backend(backend):
        out = _Stop.apply(_ONE_ARGUMENT[operator](ard_kernels)(x))
        (out.sum() + x.sum()).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=0, atol=0)


def test_a_slower_path_is_reported_once(recwarn: pytest.WarningsRecorder) -> None:
    """On a GPU, by name, with the reason, for the line that called."""
    refusing, taking = (SimpleNamespace(supports=lambda *_, r=r: r) for r in ("it is Tuesday", None))
    _warn.cache_clear()
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
        for _ in range(2):
            chosen = choose("adaln", {"triton": refusing, "eager": taking}, x)  # type: ignore[dict-item]
            assert chosen == "eager"
    (warning,) = recwarn.list
    assert str(warning.message) == (
        "adaln: backend 'triton' cannot be used, a slower one takes its place: it is Tuesday"
    )
    assert warning.filename == __file__


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_graph_that_names_the_wrong_backend_is_an_error(dtype: torch.dtype) -> None:
    """One traced on other tensors, or where there are compiled kernels: they would read what is not there."""
    q, x = torch.zeros(1, 5, 2, 16, dtype=dtype), _X.to(dtype)
    table, operators = _TABLE.to(dtype), torch.ops.ard_kernels
    for call in (
        lambda: operators.block_attention(q, q, q, (2, 3), "causal", 0.25, -1, "native"),
        lambda: operators.adaln(x, table, table, (2, 3), 1e-6, dtype, "native"),
        lambda: operators.gated_residual(x, x, table, (2, 3), "native"),
    ):
        with pytest.raises(ValueError, match="this graph was traced for the backend 'native': a tensor"):
            call()


def test_the_new_way_to_allow_tf32_is_understood() -> None:
    """A process of its own: PyTorch refuses to mix it with the old one."""
    done = _python(
        "import torch\n"
        "from ard_kernels.backends.attention_triton import supports\n"
        "q = torch.empty(1, 16, 1, 16, device='meta')\n"
        "print('in TF32' in supports(q))\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "print(supports(q))"
    )
    assert done.stdout.split() == ["True", "None"], done.stderr


def test_other_gpus_get_the_slower_path_and_a_reason() -> None:
    """ROCm's devices are called cuda, too, and its Triton takes other options."""
    done = _python(
        "import torch; torch.cuda.is_available = lambda: True; torch.version.hip = '6.4'\n"
        "from ard_kernels import backends; print(backends()['triton'].reason)"
    )
    assert done.stdout == "the GPU is AMD's, accepted is NVIDIA's\n", done.stderr


def test_too_little_memory_is_an_error_and_no_abort() -> None:
    """Of the compiled adaLN backward, which is told of 2^40 samples: no machine has room for their sums."""
    done = _python(
        "import torch, types\n"
        "from ard_kernels import BlockLayout, gated_residual_adaln\n"
        "from ard_kernels.backends import native\n"
        "def vast(backward, batch, *rest):\n"
        "    native.C.adaln(backward, batch << 40 if backward else batch, *rest)\n"
        "native.kernels = lambda *tensors: types.SimpleNamespace(adaln=vast)\n"
        "layout = BlockLayout((70,))\n"
        "leaves = [torch.ones(1, n, 64, requires_grad=True) for n in (70, 70, 1, 1, 1)]\n"
        "x, y = gated_residual_adaln(*leaves, layout)\n"
        "try: torch.autograd.grad((x, y), leaves, (x.detach(), y.detach()))\n"
        "except MemoryError: print('out of memory')",
        ARD_KERNELS_BACKEND="native",
    )
    assert done.stdout == "out of memory\n", (done.returncode, done.stderr)


def test_too_little_memory_in_a_thread_is_an_error_of_the_caller() -> None:
    """Whichever takes a unit: the attention backward keeps 105 MB of a head beside its gradients' 126 MB."""
    done = _python(
        "import resource, torch\n"
        "from ard_kernels import BlockLayout, block_attention\n"
        "torch.set_num_threads(4)\n"
        "q = torch.ones(1, 81920, 2, 64, requires_grad=True)\n"
        "out = block_attention(q, q, q, BlockLayout.uniform(1280, 64), mask='diagonal')\n"
        "dout = torch.ones_like(out)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (180 << 20), resource.RLIM_INFINITY))\n"
        "try: out.backward(dout)\n"
        "except MemoryError: print('out of memory')",
        ARD_KERNELS_BACKEND="native",
    )
    assert done.stdout == "out of memory\n", (done.returncode, done.stderr)


def test_work_is_done_by_as_many_threads_as_pytorch_is_told() -> None:
    """A team is kept until a call wants another one; what it no longer needs ends in its own time."""
    done = _python(
        "import os, time, torch\n"
        "from ard_kernels import gelu\n"
        "for wanted, more in ((1, 0), (3, 2), (2, -1)):\n"
        "    torch.set_num_threads(wanted)\n"
        "    before, end = len(os.listdir('/proc/self/task')), time.monotonic() + 5\n"
        "    gelu(torch.ones(1 << 17))\n"
        "    while (found := len(os.listdir('/proc/self/task')) - before) != more:\n"
        "        if time.monotonic() > end: break\n"
        "        time.sleep(0.01)\n"
        "    print(found)",
        ARD_KERNELS_BACKEND="native",
        OMP_NUM_THREADS="1",
    )
    assert done.stdout.split() == ["0", "2", "-1"], done.stderr


def test_a_call_with_little_work_leaves_the_threads_alone() -> None:
    """A team of two ends the others of eight, and PyTorch's next call starts them anew."""
    done = _python(
        "import os, torch\n"
        "from ard_kernels import gelu\n"
        "torch.set_num_threads(8)\n"
        "torch.sin(torch.ones(1 << 20))\n"
        "before = set(os.listdir('/proc/self/task'))\n"
        "gelu(torch.ones(1 << 15))\n"
        "torch.sin(torch.ones(1 << 20))\n"
        "print(len(before) > 7, set(os.listdir('/proc/self/task')) == before)",
        ARD_KERNELS_BACKEND="native",
    )
    assert done.stdout == "True True\n", done.stderr


def test_backends_forced_by_several_threads_end_one_by_one() -> None:
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("native"):
            entered.set()
            left.wait(10)
            seen.append(forced())

    seen: list[str | None] = []
    thread = threading.Thread(target=other)
    with use_backend("eager"):
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join()
    assert seen == ["native"]


def test_numbers_are_no_tensors() -> None:
    q = torch.zeros(1, 5, 1, 16)
    with pytest.raises(ValueError, match=r"^block_attention: scale is Tensor, accepted is an int or a float"):
        block_attention(q, q, q, _LAYOUT, scale=torch.tensor(0.3, requires_grad=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^adaln: eps is str"):
        ard_kernels.adaln(_X, _TABLE, _TABLE, _LAYOUT, eps="small")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has shape \(1, 5, 0, 16\), accepted is .*H and Dh >= 1"):
        block_attention(q[:, :, :0], q[:, :, :0], q[:, :, :0], _LAYOUT)


def test_forward_mode_of_pytorchs_gelu_is_pytorchs() -> None:
    x = torch.linspace(-1, 1, 9)
    with use_backend("eager"):
        _, tangent = torch.func.jvp(ard_kernels.gelu, (x,), (x * x,))
    torch.testing.assert_close(tangent, torch.func.jvp(reference.gelu, (x,), (x * x,))[1])


@pytest.mark.parametrize("operator", _ONE_ARGUMENT)
def test_what_is_no_tensor_is_named(operator: str) -> None:
    layout, good = _LAYOUT, {"x": _X, "branch": _X, "gate": _TABLE, "shift": _TABLE, "scale": _TABLE}
    if "attention" in operator:
        good = dict.fromkeys(("q", "k", "v"), _X.unsqueeze(2))
        if operator.startswith("cached"):
            good = {"q": _X[:, :2].unsqueeze(2), "k_cache": _X.unsqueeze(2), "v_cache": _X.unsqueeze(2)}
    wanted = {
        "adaln": ("x", "shift", "scale"), "gated_residual": ("x", "branch", "gate"), "gelu": ("x",)
    }.get(operator, tuple(good))  # fmt: skip
    rest = {} if operator == "gelu" else {"layout": layout}
    rest |= {"block": 0} if operator.startswith("cached") else {}
    given = {name: good[name] for name in wanted}
    getattr(ard_kernels, operator)(**given, **rest)
    for name in wanted:
        with pytest.raises(ValueError, match=rf"^{operator}: {name} is NoneType, accepted is a Tensor"):
            getattr(ard_kernels, operator)(**{**given, name: None}, **rest)


class _Named(TorchDispatchMode):
    """Names of the operators that run, gradients' included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", [name for name in _ONE_ARGUMENT if name != "cached_block_attention"])
def test_a_backward_is_the_operators_and_nothing_else(operator: str) -> None:
    """No gradients of zero are made for statistics that nobody differentiates: on a GPU a launch each."""
    heads = operator == "block_attention"
    leaf = torch.rand(1, 5, 1, 16) if heads else torch.rand(1, 5, 16)
    inputs = [leaf.clone().requires_grad_() for _ in range(3 if heads else 2 if "gated" in operator else 1)]
    tables = [] if heads or operator == "gelu" else [torch.rand(1, 2, 16)] * (1 + ("adaln" in operator))
    tables += [torch.rand(1, 2, 16)] if operator == "gated_residual_adaln" else []
    rest = () if operator == "gelu" else (_LAYOUT,)
    out = getattr(ard_kernels, operator)(*inputs, *tables, *rest)
    outs = out if isinstance(out, tuple) else (out,)
    douts = [torch.rand_like(x) for x in outs]
    with _Named() as seen:
        torch.autograd.grad(outs, inputs, douts)
    (name,) = (name for name in seen.names if name != "aten.detach.default")
    assert name == f"ard_kernels.{operator}_backward.default"
