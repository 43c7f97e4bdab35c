"""The GAN stage: who learns from what, and that a run is the same on two processes and after being killed."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import randomise, tiny_teacher
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ard.checkpoints import load_student
from ard.diffusion import Diffusion
from ard.distilling import DistillConfig, distill
from ard.finetuning import FinetuneConfig, Players, finetune
from ard.losses import adversarial_loss, discriminator_loss, trajectory_loss
from ard.models import ARDTransformer
from ard.recording import RecordConfig
from ard.runs import newest_checkpoint
from ard.sampling import sample
from ard.training import Optimisation
from ard.trajectories import LiveTrajectories

_SHORT = Optimisation(
    iterations=6, batch_size=16, lr=1e-3, ema=0.9, precision="no", log_every=1, checkpoint_every=3,
    sample_every=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def regression(recording: RecordConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("regression") / "run"
    distill(
        DistillConfig(
            recording.teacher, out, recording.out, history_layers=2, head="direct", optimisation=_SHORT
        )
    )
    AcceleratorState._reset_state()
    return out


@pytest.fixture(scope="module")
def config(recording: RecordConfig, regression: Path) -> FinetuneConfig:
    return FinetuneConfig(
        recording.teacher,
        regression,
        "digits",
        Path(),
        recording.out,
        gan_warmup=2,
        history="teacher",
        optimisation=_SHORT,
    )


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def players(config: FinetuneConfig) -> Players:
    """After the warm-up, in evaluation mode: spectral norms stand still."""
    teacher = tiny_teacher().requires_grad_(False)
    student = ARDTransformer.from_teacher(teacher, 4, 2)
    randomise(student, 1)
    torch.manual_seed(0)
    made = Players(student, teacher, Diffusion("linear", "v"), replace(config, gan_warmup=0), lambda x: x)
    randomise(made.discriminator, 2)
    return made.eval()


def _batch(players: Players) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    states, real, noise = (
        torch.randn(shape, generator=generator)
        for shape in ((4, 5, 1, 28, 28), (4, 1, 28, 28), (2, 4, 1, 28, 28))
    )
    return states, torch.arange(4), real, torch.arange(4) + 5, torch.tensor([3, 400, 999, 0]), noise


@pytest.mark.parametrize("time", ["clean", "random"])
def test_gradients_are_those_of_the_two_losses(players: Players, time: str) -> None:
    """Of each loss for its own player, by autograd through everything; and none for the teacher."""
    players._config = replace(players._config, discriminator_time=time)  # type: ignore[arg-type]
    states, labels, real, real_labels, t, noise = batch = _batch(players)
    loss, logged = players(*batch, 0)
    loss.backward()
    (teacher,) = players._teacher
    got = {name: p.grad for name, p in players.named_parameters() if p.requires_grad}
    players.zero_grad()

    def logits(x: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        if time == "random":
            x = players._diffusion.add_noise(x, noise, t)
        condition = teacher.condition(t, labels)
        return players.discriminator(teacher.features(x, condition)[1], condition)

    prediction = players.student(states[:, :-1], labels)
    regression, _ = trajectory_loss(prediction, states)
    adversarial = adversarial_loss(logits(prediction[:, -1], labels, noise[0]))
    last = players.student.final_layers[-1].linear.weight
    norms = [
        torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (regression, adversarial)
    ]
    weight = float(norms[0] / (norms[1] + 1e-4))
    assert float(logged["weight"]) == pytest.approx(weight, rel=1e-5)
    student_loss = regression + 10 * weight * adversarial
    opposed = discriminator_loss(
        logits(real, real_labels, noise[1]), logits(prediction[:, -1].detach(), labels, noise[0])
    )
    assert float(loss) == pytest.approx(float(student_loss + opposed), rel=1e-5)
    for part, own in (("student", student_loss), ("discriminator", opposed)):
        weights = {
            f"{part}.{name}": p for name, p in getattr(players, part).named_parameters() if p.requires_grad
        }
        wanted = torch.autograd.grad(own, list(weights.values()), retain_graph=True)
        for name, gradient in zip(weights, wanted, strict=True):
            scale = float(gradient.norm())
            torch.testing.assert_close(got.pop(name), gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert not got
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gradients_go_through_the_last_steps_of_the_own_rollout(players: Players, depth: int) -> None:
    players._config = replace(players._config, history="own", gradient_steps=depth)
    states, labels, *_ = _batch(players)
    student = players.student
    got = players._own(states[:, 0], labels)
    torch.testing.assert_close(got, sample(student, states[:, 0], labels), rtol=1e-4, atol=1e-4)
    # Step by step, each a whole pass whose later states do not matter.
    inputs = [states[:, 0]]
    for step in range(4):
        rest = [torch.zeros_like(inputs[0])] * (3 - step)
        made = student(torch.stack([*inputs, *rest], 1), labels)[:, step]
        inputs.append(made if step >= 4 - depth else made.detach())
    weights = [p for p in student.parameters() if p.requires_grad]
    direction = torch.randn_like(inputs[-1])
    pairs = zip(
        torch.autograd.grad(got[:, -1], weights, direction, allow_unused=True),
        torch.autograd.grad(inputs[-1], weights, direction, allow_unused=True),
        strict=True,
    )
    for one, other in pairs:
        zero = torch.zeros(())
        one, other = (zero if g is None else g for g in (one, other))
        torch.testing.assert_close(
            one.expand_as(other), other.expand_as(one), rtol=1e-3, atol=1e-4 * float(other.norm())
        )


def test_the_discriminator_judges_the_own_rollout_when_asked(players: Players) -> None:
    batch = _batch(players)
    forced = players(*batch, 0)[1]
    players._config = replace(players._config, history="own")
    own = players(*batch, 0)[1]
    assert torch.equal(own["regression"], forced["regression"])
    assert not torch.equal(own["made"], forced["made"])
    assert torch.equal(own["real"], forced["real"])


def test_the_power_iteration_advances_once_a_step(players: Players) -> None:
    """However often the heads look at something: one step, and the same weights for all that they see."""
    players.train()
    name = "discriminator.heads.0.first.convolution.parametrizations.weight.0"
    norm = players.get_submodule(name)
    once = copy.deepcopy(norm)
    with torch.no_grad():
        once(
            players.get_parameter("discriminator.heads.0.first.convolution.parametrizations.weight.original")
        )
    players(*_batch(players), 0)
    assert torch.equal(norm._u, once._u)
    assert not parametrize._cache


def test_only_the_discriminator_learns_in_the_warm_up(config: FinetuneConfig, tmp_path: Path) -> None:
    """With --warmup-regression the student does, too, but from the regression alone."""
    found = newest_checkpoint(config.regression)
    assert found is not None
    _, start = found
    weights = {}
    for name, warm in (("frozen", False), ("regression", True)):
        o = replace(_SHORT, iterations=4)
        finetune(replace(config, out=tmp_path / name, gan_warmup=3, warmup_regression=warm, optimisation=o))
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000004")
        _, groups = newest_checkpoint(tmp_path / name) or (0, {})
        weights[name] = {k: v for k, v in groups["model"].items() if k.startswith("discriminator")}
        log = _log(tmp_path / name)[:3]
        assert [line["adversarial"] for line in log] == [0, 0, 0]
        same = [torch.equal(groups["model"][f"student.{k}"], v) for k, v in start["model"].items()]
        same += [torch.equal(groups["ema"][k], v) for k, v in start["ema"].items()]
        moving = sum(k in start["ema"] for k in start["model"]) + len(start["ema"])
        assert sum(same) == (len(same) - moving if warm else len(same))
        assert log[-1]["real"] - log[-1]["made"] > log[0]["real"] - log[0]["made"]
    # The student is trained: one update moves what it makes by little, and the discriminator with it.
    for name, value in weights["frozen"].items():
        torch.testing.assert_close(weights["regression"][name], value, atol=0.02, rtol=0.1)


def test_the_optimiser_has_every_trainable_weight_once(
    config: FinetuneConfig, recording: RecordConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both stages; and every one of them moves."""
    seen: list[tuple[nn.Module, list[Tensor]]] = []
    from ard import distilling, finetuning

    def watch(run: Any, accelerator: Any, model: nn.Module, *rest: Any, **options: Any) -> Any:
        own = torch.optim.AdamW

        def build(groups: Any, **arguments: Any) -> torch.optim.Optimizer:
            optimiser = own(groups, **arguments)
            seen.append((model, [p for group in optimiser.param_groups for p in group["params"]]))
            return optimiser

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim, "AdamW", build)
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            result = fit(run, accelerator, model, *rest, **options)
        still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
        assert [n.rpartition(".")[2] for n in still] == ["pos_embed"]
        return result

    fit = finetuning.fit
    monkeypatch.setattr(distilling, "fit", watch)
    monkeypatch.setattr(finetuning, "fit", watch)
    for shared in (True, False):
        distill(
            DistillConfig(recording.teacher, tmp_path / str(shared), recording.out, history_layers=2,
                          per_step_final=shared, optimisation=_SHORT)
        )  # fmt: skip
        AcceleratorState._reset_state()
    finetune(replace(config, out=tmp_path / "gan"))
    assert len(seen) == 3
    for model, held in seen:
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert sorted(map(id, held)) == sorted(map(id, trainable))


def _finetune(
    config: FinetuneConfig, out: Path, *options: object, **environment: str
) -> subprocess.Popen[bytes]:
    o = config.optimisation
    words: list[object] = [
        "--teacher", config.teacher, "--regression", config.regression, "--trajectories", config.trajectories,
        "--real", config.real, "--history", config.history, "--out", out,
        "--gan-warmup", config.gan_warmup, "--iterations", o.iterations,
        "--batch-size", o.batch_size, "--lr", o.lr, "--ema", o.ema, "--precision", o.precision, "--log-every",
        o.log_every, "--checkpoint-every", o.checkpoint_every, "--sample-every", o.sample_every,
        "--keep-checkpoints", o.keep_checkpoints, *options,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "ard", "finetune", *map(str, words)],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_a_killed_run_ends_as_if_it_had_not_been(config: FinetuneConfig, tmp_path: Path) -> None:
    """SIGKILL in the warm-up, and after it: weights of both players, averages, moments, order, noise."""
    o = replace(_SHORT, iterations=24, checkpoint_every=1, keep_checkpoints=1, sample_every=8)
    changed = replace(config, gan_warmup=8, discriminator_time="random", history="own", optimisation=o)
    finetune(replace(changed, out=tmp_path / "whole"))
    out = tmp_path / "killed"
    for reach in (3, 12):
        process = _finetune(changed, out, "--discriminator-time", "random")
        while process.poll() is None and not any(
            int(path.name[5:]) >= reach for path in (out / "checkpoints").glob("step-*")
        ):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.communicate()[1].decode()
    process = _finetune(changed, out, "--discriminator-time", "random")
    assert process.wait() == 0, process.communicate()[1].decode()
    names = ["student/model.safetensors", "log.jsonl", "samples/step-00000024.png"]
    names += [f"checkpoints/step-00000024/{g}.safetensors" for g in ("model", "ema", "optimiser")]
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_two_processes_are_one(config: FinetuneConfig, tmp_path: Path) -> None:
    """The same global batch: the same adaptive weight, and the same weights of both players, to 1e-5."""
    o = replace(_SHORT, iterations=4, lr=1e-4)
    changed = replace(config, gan_warmup=1, optimisation=o)
    finetune(replace(changed, out=tmp_path / "one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        _finetune(
            changed, tmp_path / "two", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.wait() == 0, process.communicate()[1].decode()
    one, two = _log(tmp_path / "one"), _log(tmp_path / "two")
    assert one[0]["weight"] == 0 < one[1]["weight"]
    for a, b in zip(one, two, strict=True):
        for name in (
            "loss",
            "weight",
            "regression",
            "adversarial",
            "discriminator",
            "norm",
            "norm_discriminator",
        ):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7), name
    (_, first), (_, second) = (newest_checkpoint(tmp_path / name) or (0, {}) for name in ("one", "two"))
    for group in ("model", "ema"):
        for name, value in first[group].items():
            torch.testing.assert_close(second[group][name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_run_continues_the_regression(config: FinetuneConfig, tmp_path: Path) -> None:
    """From its weights, its average and its optimiser's moments; and ends in a student that says so."""
    o = replace(_SHORT, iterations=1, ema=0.5)
    finetune(replace(config, out=tmp_path, gan_warmup=0, optimisation=o))
    (_, before), (_, after) = (newest_checkpoint(f) or (0, {}) for f in (config.regression, tmp_path))
    name = "blocks.0.attn.qkv.weight"
    moved = after["model"][f"student.{name}"]
    torch.testing.assert_close(after["ema"][name], (before["ema"][name] + moved) / 2)
    assert float(after["optimiser"]["0.step"]) == float(before["optimiser"]["0.step"]) + 1
    student, trained = load_student(tmp_path / "student")
    assert trained["finetuned"] is True
    assert torch.equal(student.state_dict()[name], after["ema"][name])


def test_accumulation_sees_the_whole_batch(config: FinetuneConfig, tmp_path: Path) -> None:
    """In its regression and its discriminator loss, but for the spectral norms, whose power iteration goes on
    by a step a pass; the adaptive weight is that of each pass."""
    for accumulate in (1, 2):
        o = replace(_SHORT, iterations=1, accumulate=accumulate)
        finetune(replace(config, out=tmp_path / str(accumulate), gan_warmup=0, optimisation=o))
    one, two = (_log(tmp_path / name)[0] for name in "12")
    assert two["regression"] == pytest.approx(one["regression"], rel=1e-5)
    for name in ("discriminator", "real", "made", "norm_discriminator"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gan_weight": 0.0}, r"gan_weight is 0\.0, accepted is a finite number > 0"),
        ({"gan_warmup": -1}, "gan_warmup is -1, accepted is an integer >= 0"),
        ({"gan_warmup": 6}, "gan_warmup is 6, accepted is less than the iterations, 6"),
        (
            {"discriminator_time": "fixed", "fixed_time": 1000},
            r"fixed_time is 1000, accepted with --discriminator-time fixed are 0\.\.999",
        ),
        ({"discriminator_time": "fixed"}, "fixed_time is None, accepted with"),
        (
            {"discriminator_time": "fixed", "fixed_time": 999},
            r"fixed_time is 999, where noise leaves 0\.0064 of the image",
        ),
        ({"fixed_time": 250}, "fixed_time is 250, but discriminator_time is 'clean', for which it has no"),
        ({"discriminator_noise": False}, "discriminator_noise is False, but discriminator_time is 'clean'"),
        ({"gradient_steps": 2}, "gradient_steps is 2, but history is 'teacher'"),
        ({"history": "own", "gradient_steps": 5}, r"gradient_steps is 5, accepted are 1\.\.4"),
        (
            {"optimisation": replace(_SHORT, precision="fp16")},
            "precision is 'fp16', accepted by the GAN stage",
        ),
        ({"real": "nowhere"}, "nowhere"),
    ],
)
def test_options_that_cannot_work_leave_no_run(
    config: FinetuneConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        finetune(replace(config, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_without_a_store_the_teacher_makes_what_the_student_knows(tmp_path: Path, teacher: Path) -> None:
    """A student distilled from a live teacher goes on with the same solver; every sample comes once."""
    made: dict[str, Any] = {"solver": "heun", "solver_steps": 10, "guidance": 1.2}
    distill(DistillConfig(
        teacher, tmp_path / "regression", steps=2, history_layers=2, grid=(10, 4, 0), **made,
        optimisation=replace(_SHORT, iterations=1)
    ))  # fmt: skip
    AcceleratorState._reset_state()
    seen: list[Any] = []
    states = LiveTrajectories.states

    def spied(self: LiveTrajectories, indices: torch.Tensor, grid: Any, state: Any) -> Any:
        seen.append((indices.tolist(), grid, {name: self.manifest[name] for name in made}))
        return states(self, indices, grid, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveTrajectories, "states", spied)
        finetune(FinetuneConfig(
            teacher, tmp_path / "regression", "digits", tmp_path / "gan", gan_warmup=1,
            optimisation=replace(_SHORT, iterations=2),
        ))  # fmt: skip
    assert seen == [([*range(i, i + 16)], (10, 4, 0), made) for i in (0, 16)]
    assert load_student(tmp_path / "gan" / "student")[1]["finetuned"]


def test_a_run_goes_on_without_the_regressions_checkpoints(config: FinetuneConfig, tmp_path: Path) -> None:
    """They are large, and it has its own."""
    regression = shutil.copytree(config.regression, tmp_path / "regression")
    own = replace(config, regression=regression, out=tmp_path / "run")
    finetune(own)
    whole = (own.out / "student" / "model.safetensors").read_bytes()
    shutil.rmtree(regression / "checkpoints")
    shutil.rmtree(own.out / "student")
    shutil.rmtree(own.out / "checkpoints" / "step-00000006")
    finetune(own)
    assert (own.out / "student" / "model.safetensors").read_bytes() == whole
    with pytest.raises(ValueError, match=r"accumulate was 1, is 2\)"):
        finetune(replace(own, optimisation=replace(_SHORT, accumulate=2)))


def test_a_regression_without_a_checkpoint_is_refused(config: FinetuneConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "student").symlink_to(config.regression / "student")
    with pytest.raises(FileNotFoundError, match="no checkpoint there; accepted is a run of `ard distill`"):
        finetune(replace(config, regression=tmp_path / "empty", out=tmp_path / "run"))


def test_a_student_alone_is_a_start(config: FinetuneConfig, tmp_path: Path) -> None:
    """Of any origin, as a converted one; its weights are the average's start, too, which keeps them."""
    o = replace(_SHORT, iterations=1, ema=0.5)
    alone = shutil.copytree(config.regression / "student", tmp_path / "downloaded")
    finetune(replace(config, regression=alone, out=tmp_path / "run", gan_warmup=0, optimisation=o))
    _, after = newest_checkpoint(tmp_path / "run") or (0, {})
    name = "blocks.0.attn.qkv.weight"
    before, moved = load_student(alone)[0].state_dict()[name], after["model"][f"student.{name}"]
    torch.testing.assert_close(after["ema"][name], (before + moved) / 2)
    assert float(after["optimiser"]["0.step"]) == 1
    assert 0 < float((moved - before).abs().max()) < 2 * o.lr, "Adam's first step"


@pytest.mark.parametrize("time", [(250, True), (999, False)])
def test_the_teacher_looks_at_the_fixed_time(
    config: FinetuneConfig, tmp_path: Path, time: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[int], bool]] = []
    look = Players._look

    def spied(self: Players, x: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Any:
        add = self._diffusion.add_noise
        added: list[int] = []
        monkeypatch.setattr(self._diffusion, "add_noise", lambda *a: added.append(1) or add(*a))
        result = look(self, x, labels, t, noise)
        monkeypatch.setattr(self._diffusion, "add_noise", add)
        seen.append((set(t.tolist()), bool(added)))
        return result

    monkeypatch.setattr(Players, "_look", spied)
    t, noised = time
    changed = replace(config, discriminator_time="fixed", fixed_time=t, discriminator_noise=noised)
    finetune(replace(changed, out=tmp_path, optimisation=replace(_SHORT, iterations=3)))
    assert seen == [({t}, noised)] * 6  # of results and of real images
