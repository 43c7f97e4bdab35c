"""Which backend is in force, and that an impossible choice is an error that says why."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import ard_kernels
from ard_kernels import BlockLayout, block_attention, use_backend
from ard_kernels.backends import forced


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
    q = torch.ones(1, 5, 1, 16, dtype=torch.bfloat16)
    for name, status in ard_kernels.backends().items():
        if status.available:
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
