"""Faults put into single steps of the commands that train."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from ard import distilling, evaluation, finetuning, training
from ard.distilling import DistillConfig, distill
from ard.evaluation import TrainClassifierConfig, train_classifier
from ard.finetuning import FinetuneConfig, finetune
from ard.training import Batch, Optimisation, TrainTeacherConfig, accelerator_for, fit, train_teacher


@dataclass(frozen=True)
class Fault:
    """A fault in some steps of one process."""

    steps: tuple[int, ...]
    """From 1."""
    kind: Literal["gradient", "loss", "both"] = "gradient"
    """What is not finite: one value of a weight's gradient, the loss, or the loss and all gradients."""
    value: float = math.nan
    rank: int = 0
    call: int | None = None
    """Which accumulation pass; None: all."""
    part: str = ""
    """Start of the name of the weight with the gradient."""


def faulty(fault: Fault, loss_of: Any) -> Any:
    """`loss_of` with a fault in some steps, of some pass on one process."""
    calls: Counter[int] = Counter()
    hooks: list[Any] = []

    def of(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        while hooks:
            hooks.pop().remove()
        loss, logged = loss_of(model, batch, step)
        here = step + 1 in fault.steps and fault.call in (None, calls[step])
        calls[step] += 1
        if here and PartialState().process_index == fault.rank:
            if fault.kind != "gradient":
                return (loss + fault.value if fault.kind == "loss" else loss * fault.value), logged
            name = "module." * isinstance(model, nn.parallel.DistributedDataParallel) + fault.part
            weight = next(
                p
                for n, p in model.named_parameters()
                if n.startswith(name) and p.requires_grad and p.dim() > 1
            )

            def spoil(gradient: Tensor) -> Tensor:
                gradient = gradient.clone()
                gradient.view(-1)[-1] = fault.value  # one value of one weight
                return gradient

            hooks.append(weight.register_hook(spoil))
        return loss, logged

    return of


@contextmanager
def _faults(fault: Fault | None) -> Iterator[None]:
    """Inside, every command that trains meets the fault."""

    def with_fault(
        run: Any, accelerator: Any, model: Any, o: Any, fetch: Any, loss_of: Any, *rest: Any, **more: Any
    ) -> dict[str, Tensor]:
        loss_of = loss_of if fault is None else faulty(fault, loss_of)
        return fit(run, accelerator, model, o, fetch, loss_of, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        for module in (training, distilling, finetuning, evaluation):
            patch.setattr(module, "fit", with_fault)
        yield


def _with_fp16(o: Optimisation, unused: bool = False) -> Accelerator:
    """accelerate scales the loss of fp16 on GPUs only; this is what it does there, on the CPU."""
    accelerator = accelerator_for(o, unused)
    if o.precision == "fp16":
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return accelerator


def train(config: Any, fault: Fault | None) -> None:
    """The command of a configuration, with a fault, and with fp16 as on a GPU."""
    command = {
        DistillConfig: distill, FinetuneConfig: finetune, TrainTeacherConfig: train_teacher,
        TrainClassifierConfig: train_classifier,
    }[type(config)]  # fmt: skip
    AcceleratorState._reset_state()
    with _faults(fault), pytest.MonkeyPatch.context() as patch:
        for module in (training, distilling):
            patch.setattr(module, "accelerator_for", _with_fp16)
        command(config)
