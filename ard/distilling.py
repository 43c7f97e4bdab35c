"""The regression stage: a student learns a teacher's trajectories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ard.checkpoints import load_teacher, save_student
from ard.data import Stream, index_uniform
from ard.diffusion import Solver
from ard.grids import chosen_grid
from ard.losses import trajectory_loss
from ard.models import ARDTransformer, DiT
from ard.pictures import image_grid
from ard.precision import Precision
from ard.runs import Run, begun, found
from ard.sampling import sample
from ard.training import Batch, Optimisation, accelerator_for, fit, settled_options
from ard.trajectories import LiveTrajectories, SolverConfig, State, Trajectories, TrajectoryStore
from ard_kernels.layout import Mask

Head = Literal["solver", "direct"]
HistoryStart = Literal["closed", "open"]


@dataclass(frozen=True)
class DistillConfig:
    """The regression stage: a student that predicts every next state of recorded trajectories from all
    earlier ones.

    history_layers 0 is step distillation, steps 1 is knowledge distillation.
    """

    teacher: Path
    """Folder of the teacher that made the trajectories; the student starts from its weights."""
    out: Path
    """Folder of the run. The student goes to its subfolder `student`. A run that is there is continued."""
    trajectories: Path | None = None
    """Folder that `ard record` wrote; without one the teacher makes trajectories while the student trains, no
    two alike."""
    solver: Solver = "ddim"
    """Of trajectories made while training, by the teacher in --precision (fp16: float32): the solver."""
    solver_steps: int = 25
    """Likewise, its steps."""
    guidance: float = 1.5
    """Likewise, the scale of classifier-free guidance; 1: none."""
    guided_channels: int | None = None
    """Likewise, guide the first so many channels only (3 for the public DiT); default: all."""
    steps: int = 4
    """S, the student's steps."""
    history_layers: int = 6
    """N, how many of the lowest layers see earlier states."""
    mask: Mask = "causal"
    """Which earlier states they see."""
    per_step_final: bool = True
    """One final layer per step, or one shared by all."""
    head: Head | None = field(default=None, metadata={"absent": "direct"})
    """What a head's output is. solver, the default: what the teacher predicts, which its first-order solver
    turns into the next state, so that the student starts as that solver over its steps. direct, with what is
    the default then, is the published recipe: the next state itself. A run that goes on keeps what it began
    with."""
    state: State | None = field(default=None, metadata={"absent": "x0"})
    """Intermediate states: the teacher's predictions of the clean image, or its noisy latents. Default: xt,
    which --head solver needs; with --head direct x0."""
    history_start: HistoryStart | None = field(default=None, metadata={"absent": "open"})
    """closed: earlier states have learned weights that start at 0. open: they weigh like the newest one.
    Default: closed, with --head direct open."""
    grid: tuple[int, ...] | None = None
    """Solver positions of the S+1 states, descending from the noise to 0. Default: of those that the
    trajectories have the ones between which the teacher's first-order solver errs least; with --head direct
    the released recipe's."""
    entry: int | None = None
    """With --head solver: the teacher's time that the noise is taken for. Default: its noisiest; of a teacher
    that predicts eps, which is multiplied by a hundred and more there, the one that errs least."""
    rollout: float = 0.0
    """Share of samples trained on the student's own states in place of the teacher's, the targets staying the
    teacher's. Not in the paper; 0: teacher forced, as there."""
    optimisation: Optimisation = field(default_factory=Optimisation)
    """How the weights are optimised."""


# How trajectories are made while training, and the defaults.
_LIVE = {
    f.name: f.default
    for f in fields(DistillConfig)
    if f.name in ("solver", "solver_steps", "guidance", "guided_channels")
}


def _trajectories(config: DistillConfig) -> Trajectories:
    if config.trajectories is not None:
        given = {name: getattr(config, name) for name in _LIVE}
        if ignored := [f"{name} is {value}" for name, value in given.items() if value != _LIVE[name]]:
            raise ValueError(f"{', '.join(ignored)}, but the trajectories of {config.trajectories} are made "
                             "already; accepted is either")  # fmt: skip
        return TrajectoryStore(config.trajectories)
    return live_trajectories(config.teacher, vars(config), config.optimisation)


def live_trajectories(teacher: Path, made: Mapping[str, Any], o: Optimisation) -> LiveTrajectories:
    """Trajectories that the teacher makes while a student trains, by the solver and guidance of `made`."""
    options = {name: made.get(name, default) for name, default in _LIVE.items()}
    made_by = SolverConfig(**options, dtype="float32", precision=_of_teacher(o), seed=o.seed)
    return LiveTrajectories(teacher, made_by)


def _of_teacher(o: Optimisation) -> Precision:
    """In which the teacher computes beside a student."""
    return "no" if o.precision == "fp16" else o.precision


def _settled_head(config: DistillConfig) -> DistillConfig:
    """With the head of the run that goes on, or the default, and what depends on it."""
    head: Head = config.head or begun(config.out, config, "head") or "solver"
    solver = head == "solver"
    state = config.state or ("xt" if solver else "x0")
    start = config.history_start or ("closed" if solver else "open")
    if solver and state == "x0":
        raise ValueError("state is 'x0', accepted with --head solver is 'xt', between which its steps are")
    if not solver and config.entry is not None:
        raise ValueError(f"entry is {config.entry}, accepted with --head direct is none")
    if start == "closed" and config.history_layers > 0 and config.optimisation.precision == "fp16":
        raise ValueError(
            "history_start is 'closed', accepted with --precision fp16 is 'open': the gradients of a closed "
            "history are too small for fp16"
        )
    return replace(config, head=head, state=state, history_start=start)


def _settled_states(
    config: DistillConfig, teacher: DiT, store: Trajectories, accelerator: Accelerator
) -> dict[str, Any]:
    """The grid and the levels (None for direct heads) of the run that goes on, or what the options and the
    defaults come to; on all processes the same."""
    known = found(config.out, "states")
    if known is not None and len(known["grid"]) == config.steps + 1:
        states = {**known, "grid": store.grid(config.steps, tuple(known["grid"]))}
    elif config.head == "direct":
        states = {"grid": store.grid(config.steps, config.grid), "levels": None}
    else:
        teacher.to(accelerator.device)
        precision = _of_teacher(config.optimisation)
        grid, entry = chosen_grid(teacher, store, config.steps, config.grid, config.entry, precision)
        states = {"grid": grid, "levels": [entry, *store.levels(grid)[1:]]}
    broadcast_object_list(whole := [states])
    return whole[0]


def distill(config: DistillConfig) -> None:
    config = _settled_head(config)
    o, precision = settled_options(
        config.optimisation, config.out, "cosine" if config.head == "solver" else "constant"
    )
    config = replace(config, optimisation=o)
    state: State = "x0" if config.state == "x0" else "xt"
    if not 0 <= config.rollout <= 1:
        raise ValueError(f"rollout is {config.rollout}, accepted is a share in [0, 1]")
    accelerator = accelerator_for(o)
    store = _trajectories(config)
    teacher, _ = load_teacher(config.teacher)
    store.check_teacher(config.teacher)
    over = _settled_states(config, teacher, store, accelerator)
    grid = over["grid"]
    if state == "xt" and store.manifest["solver_steps"] - 1 in grid:
        raise ValueError(f"grid is {grid}, of which position {grid[1]} is the noise itself in xt states; "
                         "accepted is a grid without it")  # fmt: skip
    student = ARDTransformer.from_teacher(
        teacher, config.steps, config.history_layers, config.mask, config.per_step_final,
        levels=over["levels"], gated_history=config.history_start == "closed",
    )  # fmt: skip
    student.checkpointing = o.checkpointing
    if o.compile:
        student.compile()
    inputs = {"teacher": store.manifest["teacher"], "trajectories": store.identity()}
    run = Run(config.out, "distill", config, accelerator.is_main_process, inputs, precision, over)

    def fetch(positions: range) -> Batch:
        where = torch.arange(positions.start, positions.stop)
        chosen = index_uniform(where, o.seed, Stream.ROLLOUT) < config.rollout
        return *store.states(store.order(positions, o.seed), grid, state), chosen

    def loss_of(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        states, labels, chosen = batch
        inputs = states[:, :-1]
        if config.rollout and chosen.any():  # the latter waits for the GPU
            with accelerator.autocast():
                own = sample(student, states[chosen, 0], labels[chosen], cuda_graph=False)
            inputs = inputs.clone()
            inputs[chosen, 1:] = own[:, :-1]
        loss, terms = trajectory_loss(model(inputs, labels), states)
        return loss, {"terms": terms}

    preview = student_preview(store, grid, state, accelerator)
    weights = fit(run, accelerator, student, o, fetch, loss_of, preview)
    if accelerator.is_main_process:
        save_student(config.out / "student", student, store.summary(grid, state), weights)
        print(f"student: {config.out / 'student'}")


def student_preview(
    store: Trajectories, grid: tuple[int, ...], state: State, accelerator: Accelerator
) -> Callable[[nn.Module], Tensor]:
    """A student's picture for `fit`: its results above the teacher's, from the same noise."""

    def preview(student: nn.Module) -> Tensor:
        assert isinstance(student, ARDTransformer)
        path, labels = store.states(torch.arange(min(10, len(store))), grid, state)
        noise, labels = path[:, 0].to(accelerator.device), labels.to(accelerator.device)
        with accelerator.autocast():
            made = sample(student, noise, labels, cuda_graph=False)
        rows = torch.stack([made[:, -1].cpu(), path[:, -1]]).flatten(0, 1)
        return image_grid(rows, columns=len(labels))

    return preview
