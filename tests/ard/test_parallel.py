"""A student that is replicated or sharded over processes has the gradients of one process."""

from __future__ import annotations

import copy
import gc
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_teacher
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ard.models import ARDTransformer
from ard.models.dit import AdaLNModulation


def _loss(student: nn.Module, rows: slice) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    states, targets = torch.randn(2, 4, 3, 1, 28, 28, generator=generator).unbind(0)
    return F.mse_loss(student(states[rows], torch.arange(4)[rows]), targets[rows])


def _gradients(student: nn.Module) -> dict[str, Tensor]:
    grads = {
        name.removeprefix("module."): p.grad for name, p in student.named_parameters() if p.requires_grad
    }
    return {
        name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items() if g is not None
    }


def _process(kind: str) -> None:
    """What each of two processes does."""
    dist.init_process_group("gloo")
    _compare(kind)
    # The last owner of a process group waits for its threads. DDP would hold the interpreter's lock then, and
    # a mesh that FSDP2's modules still hold when the process ends would abort it.
    gc.collect()
    dist.destroy_process_group()


def _compare(kind: str) -> None:
    whole = ARDTransformer.from_teacher(tiny_teacher(), 3, 1, "causal")
    student: nn.Module = copy.deepcopy(whole)
    _loss(whole, slice(0, 4)).backward()
    if kind == "DDP":
        student = DistributedDataParallel(student)
    else:
        mesh = init_device_mesh("cpu", (2,))
        # Tables are made before the blocks run: a layer's last pass already applies the next one's.
        for module in [m for m in student.modules() if isinstance(m, AdaLNModulation)]:
            fully_shard(module, mesh=mesh)
        for block in student.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(student, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in student.parameters())
    first = 2 * dist.get_rank()
    _loss(student, slice(first, first + 2)).backward()
    wanted, got = _gradients(whole), _gradients(student)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_gradients_are_those_of_one_process(kind: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [sys.executable, *launch, __file__, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    _process(sys.argv[1])
