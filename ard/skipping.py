"""Steps of training that are left out because the loss or a gradient is not finite.

The device decides, before the optimiser moves: the fused AdamW reads a flag there and leaves weights, moments
and its count of steps as they are. The processes share the flag, so all leave out the same steps. The host
learns of it one step later, when the device already has the work of the next step: it does not wait for an
idle device. What depends on the host's knowledge (the moving average, the count, the decision to stop) waits
for that; it is settled before anything is logged, shown or saved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ard.runs import checkpoints


class Skips:
    """Decide which steps are left out, count them, and stop a run that leaves out too many in a row.

    Args:
        folder: of the run; errors name it.
        parts: names of the parts of the model, each of which has a gradient of its own.
        limit: how many steps in a row may be left out.
        optimiser: fused; its steps are left out.
        accelerator: the processes that decide together, and the loss scale of fp16.

    Attributes:
        total: steps left out so far.

    A gradient of fp16 that overflows at a loss scale above 1 is no fault. The scale halves, from 65536 to 1
    in 16 such steps, and they are neither counted nor reported. At a scale of 1 or less it is a fault.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[str],
        limit: int,
        optimiser: torch.optim.Optimizer,
        accelerator: Accelerator,
    ) -> None:
        self.total = 0
        self._row = 0
        self._causes: list[str] = []
        self._folder, self._parts, self._limit, self._accelerator = folder, parts, limit, accelerator
        self._skip = torch.zeros((), device=accelerator.device)
        self._pending: tuple[int, Callable[[], list[bool]], Callable[[], None]] | None = None
        optimiser.register_step_pre_hook(self._tell)

    def _tell(self, optimiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A flag that GradScaler has set is covered: a gradient that is not finite has such a norm.
        optimiser.found_inf = self._skip

    def judge(self, step: int, loss: Tensor, norms: Sequence[Tensor], done: Callable[[], None]) -> None:
        """Decide whether the optimiser's next step is left out.

        Args:
            step: the step's number, from 1.
            loss: (), this process's.
            norms: () each, of the gradients of the parts.
            done: called by `settle` if the step was not left out.
        """
        self.settle()
        device = self._accelerator.device
        # The norm of a part without gradients lies on the host; a blocking copy would wait for the device.
        finite = [x.detach().to(device, non_blocking=True).isfinite() for x in (loss, *norms)]
        bad = (~torch.stack(finite)).float()
        bad = self._accelerator.reduce(bad, "sum") > 0  # on any process
        self._skip = bad.any().float()
        scaler = self._accelerator.scaler
        lowers = (
            torch.zeros_like(bad[:1]) if scaler is None else scaler.scale(torch.ones(1, device=device)) > 1
        )
        self._pending = step, _later(torch.cat([bad, lowers])), done

    def settle(self) -> None:
        """Learn whether the step judged last was left out.

        Raises:
            ValueError: more steps in a row were left out than `limit`.
        """
        if self._pending is None:
            return
        step, flags, done = self._pending
        self._pending = None
        loss, *gradients, lowers = flags()
        if not loss and not any(gradients):
            self._row, self._causes = 0, []
            done()
            return
        if lowers and not loss:
            return
        self.total += 1
        self._row += 1
        cause = "the loss is not finite"
        if not loss:
            bad = [name for name, is_bad in zip(self._parts, gradients, strict=True) if is_bad]
            whose = f" of the {' and the '.join(bad)}" if len(self._parts) > 1 else ""
            cause = f"the gradient{whose} is not finite, the loss is"
        self._causes.append(cause)
        if self._accelerator.is_main_process:
            tqdm.write(f"{self._folder.name}: step {step} is left out: {cause}", file=sys.stderr)
        if self._row > self._limit:
            self._stop(step)

    def _stop(self, step: int) -> None:
        found = checkpoints(self._folder)
        newest = f"the newest checkpoint, of step {found[-1][0]}, is finite" if found else "no checkpoint yet"
        raise ValueError(
            f"{self._folder}: {self._row} steps in a row, up to step {step}, were left out, accepted are "
            f"{self._limit} (--max-skipped): {'; '.join(dict.fromkeys(self._causes))}; {newest}. If the "
            "machine was the cause, the same command goes on; else try a new run with a lower --lr or --clip"
        )

    def state(self) -> dict[str, Tensor]:
        """The counts as a checkpoint's tensors; nothing if no step was left out."""
        counts = {"total": self.total, "row": self._row}
        return {name: torch.tensor(value) for name, value in counts.items()} if self.total else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.total, self._row = int(tensors["total"]), int(tensors["row"])


def _later(flags: Tensor) -> Callable[[], list[bool]]:
    """Copy flags to the host behind the work that the device has; return a function that waits for them."""
    host = flags.to("cpu", non_blocking=True)
    if not flags.is_cuda:
        return host.tolist
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[bool]:
        copied.synchronize()
        values: list[bool] = host.tolist()
        return values

    return read
