"""The second stage: a student that is trained already learns to fool a discriminator as well.

Two players, one pass. The discriminator sees final states through the features of the frozen teacher. The
student's adversarial gradient is taken at its final state, where it is cut: from there on it is a vector, so
that the student's backward runs once, over both its losses, and no gradient reaches a head or the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ard.checkpoints import WEIGHTS, load_student, load_teacher, save_student, sha256
from ard.data import DEBIAN_FOLDER, Stream, index_noise, index_uniform, open_images, shuffled
from ard.diffusion import Diffusion
from ard.distilling import live_trajectories, student_preview
from ard.losses import adaptive_weight, adversarial_loss, discriminator_loss, trajectory_loss
from ard.models import ARDTransformer, DiT
from ard.models.discriminator import Discriminator
from ard.runs import Run, checkpoints
from ard.sampling import sample
from ard.training import Batch, Optimisation, accelerator_for, fit, settled_options
from ard.trajectories import Trajectories, TrajectoryStore


@dataclass(frozen=True)
class FinetuneConfig:
    """The GAN stage: go on from a run of `ard distill` with a hinge loss against a discriminator beside the
    regression."""

    teacher: Path
    """Folder of the teacher, whose frozen features the discriminator sees."""
    regression: Path
    """Folder of the finished run of `ard distill`: its weights, average and optimiser are the start. Or of a
    student alone, whose weights are the start, with an optimiser that knows nothing yet."""
    real: str
    """Real images: fashion-mnist, digits, a folder of `ard encode`, or of images in a subfolder a class."""
    out: Path
    """Folder of the run. The student goes to its subfolder `student`. A run that is there is continued."""
    trajectories: Path | None = None
    """The trajectories that it was trained on; default: the teacher makes such while the student trains."""
    data: Path = DEBIAN_FOLDER
    """Folder of the Fashion-MNIST files."""
    flip: bool | None = None
    """Mirror real images with probability 1/2. Default: yes, but not those of a named data set (shoes point
    one way)."""
    gan_weight: float = 10.0
    """Factor on the adversarial loss, over the adaptive weight."""
    gan_warmup: int = 3000
    """Steps at the start in which only the discriminator learns."""
    gan_ramp: int = 0
    """Steps after them over which the adversarial loss comes in: at once it is many times the gradient that
    the optimiser's moments are used to. The released recipe has 0."""
    warmup_regression: bool = False
    """Train the student on the regression loss meanwhile, as the released recipe does."""
    discriminator_lr: float = 1e-3
    """Peak learning rate of the discriminator; that of the student is --lr."""
    discriminator_time: Literal["clean", "fixed", "random"] = "clean"
    """Time at which the teacher looks: 0, --fixed-time, or uniform over all times for each sample."""
    fixed_time: int | None = None
    """The time of --discriminator-time fixed."""
    discriminator_noise: bool = True
    """Add the noise of a fixed or random time. (The released code looks at t = 999 without.)"""
    history: Literal["own", "teacher"] = "own"
    """Whose states the judged result comes from: the student's own, as when sampling, or the teacher's
    (teacher forced), as in the released code. docs/gan.md has the experiment."""
    gradient_steps: int = 1
    """With --history own: through how many of the last steps the adversarial gradient goes."""
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(iterations=20_000, batch_size=48))
    """How the weights are optimised."""


class Players(nn.Module):
    """The student and the discriminator, and the losses of both in one pass.

    Args:
        reduce: mean of a tensor over all processes.

    The teacher is not part of the module: it is neither trained nor saved with it.
    """

    def __init__(
        self, student: ARDTransformer, teacher: DiT, diffusion: Diffusion, config: FinetuneConfig,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        super().__init__()
        self.student, self.discriminator = student, Discriminator(teacher.width, teacher.depth)
        self._teacher, self._diffusion, self._config, self._reduce = (teacher,), diffusion, config, reduce

    def forward(
        self,
        states: Tensor,
        labels: Tensor,
        real: Tensor,
        real_labels: Tensor,
        t: Tensor,
        noise: Tensor,
        step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            states: (B, S+1, C, h, w), the noise and the teacher's states.
            labels, real_labels: (B,), of the trajectories and of the real images.
            real: (B, C, h, w).
            t: (B,) int64, the times at which the discriminator looks.
            noise: (2, B, C, h, w), of a result's and of a real image's look.
            step: of the optimiser.

        Returns:
            The loss whose gradient is the student's and the discriminator's, each for its own weights; and
            what to log.
        """
        warm = step < self._config.gan_warmup
        learns = not warm or self._config.warmup_regression
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            prediction = self.student(states[:, :-1], labels)
            regression, terms = trajectory_loss(prediction, states)
            judged = prediction if self._config.history == "teacher" else self._own(states[:, 0], labels)
            fake = judged[:, -1].float()
        with parametrize.cached():  # one step of the power iteration of the spectral norms per step
            seen = fake.detach().requires_grad_(not warm)
            features, condition = self._look(seen, labels, t, noise[0])
            made = self.discriminator([x.detach() for x in features], condition)
            adversarial = weight = made.new_zeros(())
            if not warm:
                adversarial = adversarial_loss(self.discriminator(features, condition))
                (pull,) = torch.autograd.grad(adversarial, seen)
                adversarial = adversarial.detach()
            true = self.discriminator(*self._look(real, real_labels, t, noise[1]))
        opposed = discriminator_loss(true, made)
        loss = opposed + regression
        if not warm:
            weight = self._weight(regression, fake, pull)
            cut = (fake * pull).sum()  # its gradient is the adversarial loss's, its value is not
            share = min(1.0, (step + 1 - self._config.gan_warmup) / (self._config.gan_ramp + 1))
            loss = loss + share * self._config.gan_weight * weight * (cut - cut.detach() + adversarial)
        logged = {
            "terms": terms, "regression": regression, "adversarial": adversarial, "weight": weight,
            "discriminator": opposed, "real": true.mean(), "made": made.mean(),
        }  # fmt: skip
        return loss, {name: value.detach() for name, value in logged.items()}

    def _look(self, x: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> tuple[list[Tensor], Tensor]:
        """The teacher's features of x (B, C, h, w) at times t, (B, L, D) each, and their condition (B, D)."""
        (teacher,) = self._teacher
        if self._config.discriminator_time != "clean" and self._config.discriminator_noise:
            x = self._diffusion.add_noise(x, noise, t)
        condition = teacher.condition(self._diffusion.network_time(t), labels)
        return teacher.features(x, condition)[1], condition

    def _own(self, noise: Tensor, labels: Tensor) -> Tensor:
        """(B, S, C, h, w), the student's predictions given its own, with gradients through the last steps.

        All steps in one pass on the states that were sampled before; that pass again, on its own predictions,
        for every further step that a gradient goes through.
        """
        steps, depth = self.student.steps, self._config.gradient_steps
        path = sample(self.student, noise, labels, cuda_graph=False)
        inputs = torch.cat([noise.unsqueeze(1), path[:, :-1]], 1)
        for _ in range(depth):
            prediction: Tensor = self.student(inputs, labels)
            inputs = torch.cat(
                [inputs[:, : steps - depth + 1], prediction[:, steps - depth : steps - 1].float()], 1
            )
        return prediction

    def _weight(self, regression: Tensor, fake: Tensor, pull: Tensor) -> Tensor:
        """The adaptive weight at the last step's final linear layer, the same on every process."""
        weight = self.student.final_layers[-1].linear.weight  # type: ignore[union-attr]
        (one,) = torch.autograd.grad(regression, weight, retain_graph=True)  # type: ignore[arg-type]
        (other,) = torch.autograd.grad(fake, weight, pull, retain_graph=True)  # type: ignore[arg-type]
        return adaptive_weight(*self._reduce(torch.stack([one, other])).unbind(0))


def finetune(config: FinetuneConfig) -> None:
    o, precision = settled_options(config.optimisation, config.out)
    config = replace(config, optimisation=o)
    _check(config)
    accelerator = accelerator_for(o, unused=True)
    store: Trajectories | None = None if config.trajectories is None else TrajectoryStore(config.trajectories)
    run_of_student = (config.regression / "student").is_dir()
    folder = config.regression / "student" if run_of_student else config.regression
    student, trained = load_student(folder)
    if store is None:
        store = live_trajectories(config.teacher, trained, o)
    teacher, diffusion = load_teacher(config.teacher)
    store.check_teacher(config.teacher)
    time = _fixed_time(config, diffusion)
    grid, state = store.of_student(folder, student, trained)
    if config.history == "own" and not 1 <= config.gradient_steps <= student.steps:
        raise ValueError(
            f"gradient_steps is {config.gradient_steps}, accepted are 1..{student.steps}, the student's steps"
        )
    if run_of_student and not checkpoints(config.out) and not checkpoints(config.regression):
        raise FileNotFoundError(
            f"{config.regression}: no checkpoint there; accepted is a run of `ard distill`, or {folder}, "
            "whose weights alone are a start, too"
        )
    images = open_images(config.real, student.channels, student.input_size, student.num_classes, config.data)
    named = config.real in ("fashion-mnist", "digits")
    flips = not named if config.flip is None else config.flip
    student.requires_grad_(True).pos_embed.requires_grad_(False)
    student.checkpointing = o.checkpointing
    if o.compile:
        # Not the final layers, where gradients are taken before the backward, which compiled code does once.
        student.trunk = torch.compile(student.trunk)  # type: ignore[method-assign]
        teacher.features = torch.compile(teacher.features)  # type: ignore[method-assign]
    teacher.to(accelerator.device)
    torch.manual_seed(o.seed)
    players = Players(student, teacher, diffusion, config, lambda x: accelerator.reduce(x, "mean"))
    inputs = {
        "teacher": store.manifest["teacher"], "trajectories": store.identity(),
        "regression": sha256(folder / WEIGHTS),
    }  # fmt: skip
    run = Run(config.out, "finetune", config, accelerator.is_main_process, inputs, precision)
    shape = (student.channels, *student.input_size)

    def fetch(positions: range) -> Batch:
        first, count = positions.start, len(positions)
        where = torch.arange(first, first + count)
        states, labels = store.states(store.order(positions, o.seed), grid, state)
        mirrored = index_uniform(where, o.seed, Stream.FLIP) < 0.5 * flips
        real, real_labels = images.fetch(shuffled(first, count, len(images), o.seed), mirrored)
        if config.discriminator_time == "random":
            t = (index_uniform(where, o.seed, Stream.TIME) * diffusion.timesteps).long()
        else:
            t = torch.full((count,), time)
        noise = torch.stack([index_noise(where, shape, o.seed, s) for s in (Stream.MADE, Stream.REAL)])
        return states, labels, real, real_labels, t, noise

    def loss_of(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logged = model(*batch[:-1], batch[-1], step)
        return loss, logged

    weights = fit(
        run, accelerator, players, o, fetch, loss_of,
        student_preview(store, grid, state, accelerator),
        parts={
            "student": (student, 1.0),
            "discriminator": (players.discriminator, config.discriminator_lr / o.lr),
        },
        initial=config.regression if run_of_student else None, ramp=False,
    )  # fmt: skip
    if accelerator.is_main_process:
        save_student(config.out / "student", student, {**trained, "finetuned": True}, weights)
        print(f"student: {config.out / 'student'}")


# Share of the image beside the noise. With 0.006 (t = 999 of the linear schedule) the gradient at the image
# was a two-thousandth of that at t = 0.
_LEAST_SIGNAL = 0.01


def _fixed_time(config: FinetuneConfig, diffusion: Diffusion) -> int:
    """At which the teacher looks, unless the times are random."""
    t, last = config.fixed_time, diffusion.timesteps - 1
    if config.discriminator_time != "fixed":
        return 0
    if t is None or not 0 <= t <= last:
        raise ValueError(f"fixed_time is {t}, accepted with --discriminator-time fixed are 0..{last}")
    if config.discriminator_noise and diffusion.alpha[t] < _LEAST_SIGNAL:
        raise ValueError(
            f"fixed_time is {t}, where noise leaves {float(diffusion.alpha[t]):.4f} of the image: nothing to "
            f"tell results by; accepted are times that leave {_LEAST_SIGNAL} and more, or "
            "--no-discriminator-noise"
        )
    return t


def _check(config: FinetuneConfig) -> None:
    o = config.optimisation
    if o.precision == "fp16":
        raise ValueError("precision is 'fp16', accepted by the GAN stage are 'bf16', 'tf32' and 'no'")
    for name in ("gan_weight", "discriminator_lr"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} is {getattr(config, name)}, accepted is a finite number > 0")
    if not o.lr > 0:
        raise ValueError(f"lr is {o.lr}, accepted by the GAN stage is a finite number > 0")
    for name in ("gan_warmup", "gan_ramp"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} is {getattr(config, name)}, accepted is an integer >= 0")
    if config.gan_warmup >= o.iterations:
        raise ValueError(
            f"gan_warmup is {config.gan_warmup}, accepted is less than the iterations, {o.iterations}: else "
            "the student never learns from the discriminator"
        )
    without_effect = [
        (config.discriminator_time != "fixed", "fixed_time", "discriminator_time"),
        (config.discriminator_time == "clean", "discriminator_noise", "discriminator_time"),
        (config.history == "teacher", "gradient_steps", "history"),
    ]
    own = {f.name: f.default for f in fields(FinetuneConfig)}
    for unused, name, by in without_effect:
        if unused and getattr(config, name) != own[name]:
            raise ValueError(f"{name} is {getattr(config, name)}, but {by} is {getattr(config, by)!r}, for "
                             "which it has no effect; accepted is either")  # fmt: skip
