"""The training loop, and the two things it trains: a teacher on images, a student on trajectories.

Everything random is a function of (seed, step, rank): the order of the data, the noise, the times. A
checkpoint is therefore complete with the weights, their moving average, the optimiser's moments and the step,
and a run that goes on from it computes what an uninterrupted run would have computed.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from tqdm import tqdm

from ard.checkpoints import load_weights, save_teacher
from ard.data import (
    DEBIAN_FOLDER,
    Dataset,
    Images,
    check_counts,
    check_seed,
    index_noise,
    load_images,
    shuffled,
)
from ard.diffusion import Diffusion, Prediction, Schedule, guided
from ard.finite import check_finite
from ard.losses import denoising_loss
from ard.models import DiT
from ard.pictures import image_grid, save_png
from ard.precision import settled, tf32
from ard.runs import Run, begun, checkpoints, newest_checkpoint
from ard.shards import worker_device
from ard.skipping import Skips

Batch = tuple[Tensor, ...]
Fetch = Callable[[range], Batch]
LrSchedule = Literal["constant", "cosine"]
LossOf = Callable[[nn.Module, Batch, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Optimisation:
    """How the weights are optimised. The defaults are ARD's regression stage."""

    iterations: int = 300_000
    """Optimiser steps."""
    batch_size: int = 64
    """Samples per optimiser step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Forward passes per optimiser step; the batch is divided among them."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: LrSchedule | None = field(default=None, metadata={"absent": "constant"})
    """Learning rate after the warm-up: constant, or a cosine to zero at the last step. Default: constant; of
    `ard distill --head solver` cosine."""
    warmup: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down. 0: none."""
    max_skipped: int = 10
    """A step whose loss or gradient is not finite is left out. How many in a row may be; one more stops the
    run, and its checkpoints stay as they are."""
    ema: float = 0.9999
    """Decay of the moving average of the weights, which is what gets saved at the end. Early on it is lower,
    (1 + step) / (10 + step), so that the average forgets where it started; not in the GAN stage."""
    precision: Literal["auto", "no", "tf32", "bf16", "fp16"] = "auto"
    """Float32 ("no"), float32 with TF32 products on a GPU (the paper's), or the autocast dtype of the forward
    pass. auto: bf16 where its products are faster than float32's (GPUs from compute capability 8.0,
    processors with AVX512-BF16 or AMX), else float32; a run that goes on keeps what it began with."""
    checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    compile: bool = False
    """torch.compile the model."""
    log_every: int = 50
    """Steps between lines of the log."""
    checkpoint_every: int = 5000
    """Steps between checkpoints. Training waits while one is written."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    sample_every: int = 1000
    """Steps between pictures of samples; 0: none."""
    seed: int = 0
    """Seed of the data order and of all noise."""


def learning_rate(o: Optimisation, step: int) -> float:
    """The learning rate of the update from `step` to `step + 1`."""
    warm = min(1.0, (step + 1) / (o.warmup + 1))
    return (
        o.lr
        * warm
        * (0.5 * (1 + math.cos(math.pi * step / o.iterations)) if o.lr_schedule == "cosine" else 1.0)
    )


class _EMA:
    """Moving average of the weights, float32. Where it starts as their copy, a lower early decay forgets
    that (`ramp`)."""

    def __init__(self, model: nn.Module, decay: float, ramp: bool) -> None:
        self.decay, self.ramp = decay, ramp
        self.source = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self.source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay
        torch._foreach_lerp_(
            list(self.average.values()), [p.float() for p in self.source.values()], 1 - decay
        )

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        # In the order of the weights: `update` pairs them by position, and a file lists its tensors by name.
        self.average = {name: tensors[name].to(p.device, copy=True) for name, p in self.source.items()}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict with the averages in place of the weights."""
        return {**model.state_dict(), **self.average}


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{i}.{key}": value
        for i, slots in optimiser.state_dict()["state"].items()
        for key, value in slots.items()
    }


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value.clone()  # of the file's memory
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def _restore(
    folder: Path, model: nn.Module, ema: _EMA, optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None, skips: Skips | None = None,
) -> int:  # fmt: skip
    """The newest checkpoint of a run, into what is trained; its step. Nothing keeps the files open."""
    found = newest_checkpoint(folder)
    assert found is not None
    step, groups = found
    load_weights(model, groups["model"], folder)
    ema.load(groups["ema"])
    _load_optimiser(optimiser, groups["optimiser"])
    if scaler is not None and "scaler" in groups:  # fp16
        _load_scaler(scaler, groups["scaler"])
    if skips is not None and "skipped" in groups:
        skips.load(groups["skipped"])
    return step


def _scaler_tensors(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in scaler.state_dict().items()}


def _load_scaler(scaler: torch.amp.GradScaler, tensors: Mapping[str, Tensor]) -> None:
    own = scaler.state_dict()
    scaler.load_state_dict({name: type(own[name])(value) for name, value in tensors.items()})


def fit(
    run: Run,
    accelerator: Accelerator,
    model: nn.Module,
    o: Optimisation,
    fetch: Fetch,
    loss_of: LossOf,
    preview: Callable[[nn.Module], Tensor] | None,
    parts: Mapping[str, tuple[nn.Module, float]] | None = None,
    initial: Path | None = None,
    ramp: bool = True,
) -> dict[str, Tensor]:
    """Train to the end, from the newest checkpoint of the run if there is one.

    Args:
        fetch: positions in the endless stream of samples -> a batch of tensors. The positions of all
            processes and accumulation steps together are those of one large batch; whatever is random about a
            sample is a function of its position.
        loss_of: (model, batch on the device, step) -> scalar loss, and values to log, () or (n,).
        preview: model with averaged weights -> a picture (h, w) uint8; None where there is nothing to see.
        parts: parts of the model, each with a factor on the learning rate, and clipped on its own. The
            first is averaged, previewed and returned. A part without gradients stays as it is in that
            step. Default: all of the model.
        initial: folder of an earlier run, from whose newest checkpoint the first part starts.
        ramp: whether the average forgets the weights that it starts from, see `Optimisation.ema`.

    A module of the model that has a method `constrain` is called so after every step (`HistoryGates`).

    A step whose loss or gradient is not finite is left out on all processes, see `Skips`: the stream of
    samples goes on, weights, averages and the optimiser stay as they are. The log counts such steps as
    "skipped".

    Returns:
        The state dict of the first part with averaged weights.

    Raises:
        ValueError: more than `Optimisation.max_skipped` steps in a row were left out; an update by a finite
            gradient overflowed; the newest checkpoint is damaged or not finite.
    """
    parts = parts or {"model": (model, 1.0)}
    trained = [[p for p in part.parameters() if p.requires_grad] for part, _ in parts.values()]
    averaged = next(iter(parts.values()))[0]
    optimiser: Any = torch.optim.AdamW(
        [{"params": weights} for weights in trained],
        lr=o.lr, weight_decay=o.weight_decay, betas=(0.9, 0.999), fused=True,
    )  # fmt: skip
    skips = Skips(run.folder, list(parts), o.max_skipped, optimiser, accelerator)
    model.to(accelerator.device)
    ema = _EMA(averaged, o.ema, ramp)
    start = 0
    if checkpoints(run.folder):
        start = _restore(run.folder, model, ema, optimiser, accelerator.scaler, skips)
    elif initial is not None:
        _restore(initial, averaged, ema, optimiser, accelerator.scaler)
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise ValueError(
            f"{run.folder}: processes find checkpoints of steps {sorted(set(starts))} there, accepted is a "
            "folder that all share"
        )
    bare = model
    constrained: list[Any] = [module for module in model.modules() if hasattr(module, "constrain")]
    model, optimiser = accelerator.prepare(model, optimiser)
    model.train()
    run.open_log(start)
    bar = tqdm(total=o.iterations, initial=start, desc=run.folder.name, disable=not run.main, mininterval=1.0)
    with bar, contextlib.closing(run), tf32(o.precision == "tf32"):
        for step in range(start, o.iterations):
            for group, (_, factor) in zip(optimiser.param_groups, parts.values(), strict=True):
                group["lr"] = factor * learning_rate(o, step)
            torch.manual_seed(hash((o.seed, step, accelerator.process_index)))
            seen = _backward(accelerator, model, o, fetch, loss_of, step)
            norms = [accelerator.clip_grad_norm_(weights, o.clip or math.inf) for weights in trained]
            moved = any(p.grad is not None for p in trained[0])
            done = step + 1
            skips.judge(done, seen["loss"], norms, partial(ema.update, step) if moved else lambda: None)
            optimiser.step()
            for module in constrained:
                module.constrain()
            optimiser.zero_grad(set_to_none=True)
            bar.update()
            logs, keeps = (
                done % every == 0 or done == o.iterations for every in (o.log_every, o.checkpoint_every)
            )
            shows = o.sample_every and (done % o.sample_every == 0 or done == o.iterations)
            if logs or keeps or shows:  # on a GPU, reading a value waits for the step
                skips.settle()
            if logs:
                seen = {name: accelerator.reduce(value, "mean") for name, value in seen.items()}
                bar.set_postfix(loss=f"{float(seen['loss']):.4f}")
                named = zip(parts, norms, strict=True)
                run.log(done, {
                    **{name: value.tolist() for name, value in seen.items()},
                    **{"norm" if i == 0 else f"norm_{n}": float(v) for i, (n, v) in enumerate(named)},
                    "lr": learning_rate(o, step),
                    **({"skipped": skips.total} if skips.total else {}),
                })  # fmt: skip
            if preview is not None and run.main and shows:
                picture = _with_weights(averaged, ema, preview)
                save_png(run.folder / "samples" / f"step-{done:08d}.png", picture)
                run.log_image(done, "samples", picture)
            if keeps:
                groups = {
                    "model": bare.state_dict(),
                    "ema": ema.average,
                    "optimiser": _optimiser_tensors(optimiser),
                }
                # By every process, so that all stop.
                for group, tensors in groups.items():
                    check_finite(
                        f"{run.folder}: {group} after step {done}", tensors,
                        "all gradients were finite, updates are too large; try a new run with a lower --lr",
                    )  # fmt: skip
                if accelerator.scaler is not None:
                    groups["scaler"] = _scaler_tensors(accelerator.scaler)
                if counts := skips.state():
                    groups["skipped"] = counts
                if run.main:
                    run.save_checkpoint(done, groups, o.keep_checkpoints)
    accelerator.wait_for_everyone()
    return ema.state(averaged)


def _backward(
    accelerator: Accelerator, model: nn.Module, o: Optimisation, fetch: Fetch, loss_of: LossOf, step: int
) -> dict[str, Tensor]:
    """The gradient of a step's batch, in all its passes; the loss and what else to log, averaged."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    share = o.batch_size // (processes * o.accumulate)
    seen: dict[str, Tensor] = {}
    for i in range(o.accumulate):
        first = step * o.batch_size + (i * processes + rank) * share
        batch = tuple(x.to(accelerator.device, non_blocking=True) for x in fetch(range(first, first + share)))
        # The last pass alone reduces over processes.
        with accelerator.no_sync(model) if i < o.accumulate - 1 else contextlib.nullcontext():
            loss, logged = loss_of(model, batch, step)
            accelerator.backward(loss / o.accumulate)
        for name, value in {"loss": loss, **logged}.items():
            part = value.detach() / o.accumulate
            seen[name] = seen[name] + part if name in seen else part
    return seen


def _with_weights(model: nn.Module, ema: _EMA, use: Callable[[nn.Module], Tensor]) -> Tensor:
    """`use(model)` with averaged weights, under no_grad; the weights and the RNG are as before afterwards."""
    own = {name: p.detach().clone() for name, p in ema.source.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            for name, p in ema.source.items():
                p.copy_(ema.average[name])
            return use(model)
        finally:
            for name, p in ema.source.items():
                p.copy_(own[name])


def settled_options(
    o: Optimisation, out: Path, lr_schedule: LrSchedule = "constant"
) -> tuple[Optimisation, dict[str, str]]:
    """The options with what their defaults come to in the run of a folder, and the record of the precision.

    Args:
        lr_schedule: the default where there is no run yet.
    """
    precision, record = settled(o.precision, worker_device(), out, begun(out, o, "precision"))
    schedule = o.lr_schedule or begun(out, o, "lr_schedule") or lr_schedule
    return replace(o, precision=precision, lr_schedule=schedule), record


_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def accelerator_for(o: Optimisation, unused: bool = False) -> Accelerator:
    """The processes and the precision to train with; options that cannot work are an error here, before
    any file.

    Args:
        unused: whether a step may leave weights without a gradient, which costs DDP a walk over the graph.
    """
    counts = (
        "iterations", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"
    )  # fmt: skip
    check_counts("optimisation", **{name: getattr(o, name) for name in counts})
    for name in ("lr", "warmup", "weight_decay", "clip", "sample_every"):
        if not 0 <= getattr(o, name) < math.inf:
            raise ValueError(f"{name} is {getattr(o, name)}, accepted is a finite number >= 0")
    if not 0 <= o.ema < 1:
        raise ValueError(f"ema is {o.ema}, accepted is a decay in [0, 1)")
    if not o.max_skipped >= 0:
        raise ValueError(f"max_skipped is {o.max_skipped}, accepted is an integer >= 0")
    check_seed(o.seed, "optimisation")
    precision, _ = settled(o.precision, worker_device())
    if precision == "fp16" and not torch.cuda.is_available():
        warnings.warn("precision is 'fp16', which needs a GPU: this trains in float32", stacklevel=2)
    accelerator = Accelerator(
        mixed_precision="no" if precision == "tf32" else precision,
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[
            # Gradients lie where they are reduced: no second copy of them.
            DistributedDataParallelKwargs(find_unused_parameters=unused, gradient_as_bucket_view=True)
        ],
    )
    if accelerator.distributed_type in _SHARDED:
        raise ValueError(f"accelerate is set up for {accelerator.distributed_type.value}, accepted is DDP: "
                         "checkpoints and averages hold whole weights")  # fmt: skip
    if o.batch_size % (accelerator.num_processes * o.accumulate):
        raise ValueError(f"batch_size is {o.batch_size}, accepted are multiples of processes x accumulate "
                         f"({accelerator.num_processes} x {o.accumulate})")  # fmt: skip
    return accelerator


def image_batches(images: Images, seed: int) -> Fetch:
    """`fit`'s batches of pixels and labels, in shuffled epochs."""

    def fetch(positions: range) -> Batch:
        indices = shuffled(positions.start, len(positions), len(images), seed)
        return images.pixels[indices], images.labels[indices]

    return fetch


@dataclass(frozen=True)
class TrainTeacherConfig:
    """Train a small pixel-space DiT on images, as a teacher to distil."""

    out: Path
    """Folder of the run. The teacher goes to its subfolder `teacher`. A run that is there is continued."""
    dataset: Dataset = "fashion-mnist"
    """The images."""
    data: Path = DEBIAN_FOLDER
    """Folder of the Fashion-MNIST files."""
    patch_size: int = 7
    """Pixels along the edge of a patch; the images are 28x28."""
    width: int = 128
    """Channels of the residual stream."""
    depth: int = 8
    """Number of layers."""
    heads: int = 4
    """Attention heads."""
    noise_schedule: Schedule = "linear"
    """Noise schedule."""
    prediction: Prediction = "v"
    """What the network predicts."""
    time_scale: float | None = None
    """Of a flow: what the network is given for a time in [0, 1], times this."""
    class_dropout: float = 0.1
    """Share of samples trained without their class, for guidance."""
    guidance: float = 1.5
    """Guidance of the pictures made while it trains."""
    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation(
            iterations=8000,
            batch_size=128,
            lr=1e-3,
            lr_schedule="cosine",
            warmup=200,
            ema=0.999,
            sample_every=2000,
        )
    )
    """How the weights are optimised."""


def train_teacher(config: TrainTeacherConfig) -> None:
    o, precision = settled_options(config.optimisation, config.out)
    config = replace(config, optimisation=o)
    if not 0 <= config.class_dropout <= 1:
        raise ValueError(f"class_dropout is {config.class_dropout}, accepted is a share in [0, 1]")
    if not 0 <= config.guidance < math.inf:
        raise ValueError(f"guidance is {config.guidance}, accepted is a finite number >= 0")
    accelerator = accelerator_for(o)
    images = load_images(config.dataset, train=True, folder=config.data)
    torch.manual_seed(o.seed)
    model = DiT(
        input_size=(28, 28), patch_size=config.patch_size, channels=1, width=config.width, depth=config.depth,
        heads=config.heads, num_classes=10, null_class=True, learn_sigma=False,
    )  # fmt: skip
    diffusion = Diffusion(config.noise_schedule, config.prediction, time_scale=config.time_scale)
    run = Run(config.out, "train-teacher", config, accelerator.is_main_process, precision=precision)

    if o.compile:
        model.compile()

    def loss_of(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, labels = batch
        dropped = torch.rand(labels.shape, device=labels.device) < config.class_dropout
        return denoising_loss(model, diffusion, pixels, labels.masked_fill(dropped, 10)), {}

    def preview(model: nn.Module) -> Tensor:
        labels = torch.arange(40, device=accelerator.device) % 10
        noise = index_noise(torch.arange(40), (1, 28, 28), o.seed).to(accelerator.device)
        denoise = accelerator.autocast()(guided(model, 10, config.guidance))
        *_, last = diffusion.ddim(denoise, noise, labels, diffusion.solver_times(25))
        return image_grid(last.x, columns=10)

    weights = fit(run, accelerator, model, o, image_batches(images, o.seed), loss_of, preview)
    if accelerator.is_main_process:
        save_teacher(config.out / "teacher", model, diffusion, weights)
        print(f"teacher: {config.out / 'teacher'}")
