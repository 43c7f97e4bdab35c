"""Training: what is computed does not depend on how often it was stopped, nor on how the batch is divided."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from ard import distilling, training
from ard.checkpoints import load_student, load_teacher, read_tensors, write_tensors
from ard.data import Stream, index_noise, index_uniform, shuffled
from ard.diffusion import Schedule
from ard.distilling import DistillConfig, distill
from ard.losses import trajectory_loss
from ard.models import ARDTransformer
from ard.recording import RecordConfig, record
from ard.runs import Run
from ard.sampling import sample
from ard.training import (
    Batch,
    Optimisation,
    TrainTeacherConfig,
    _load_scaler,
    _scaler_tensors,
    accelerator_for,
    fit,
    learning_rate,
    train_teacher,
)
from ard.trajectories import TrajectoryStore

_SHORT = Optimisation(
    iterations=6, batch_size=8, lr=1e-3, ema=0.9, precision="no", log_every=2, checkpoint_every=3,
    sample_every=0
)  # fmt: skip


def _config(recording: RecordConfig, out: Path, o: Optimisation = _SHORT, **options: object) -> DistillConfig:
    return DistillConfig(
        recording.teacher,
        out,
        recording.out,
        **{"history_layers": 2, "head": "direct", **options},
        optimisation=o,
    )  # type: ignore[arg-type]


def _weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def _log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# A checkpoint every other step of a few milliseconds: a random moment is often inside the writing of one.
_KILLED = Optimisation(
    iterations=100, batch_size=8, accumulate=2, lr=1e-3, lr_schedule="cosine", warmup=5, ema=0.9, log_every=3,
    checkpoint_every=2, keep_checkpoints=1, sample_every=10,
)  # fmt: skip


def _command(recording: RecordConfig, out: Path) -> list[str]:
    options = [
        "--teacher", recording.teacher, "--trajectories", recording.out, "--out", out, "--history-layers", 2,
        "--iterations", 100, "--batch-size", 8, "--accumulate", 2, "--lr", 1e-3, "--lr-schedule", "cosine",
        "--warmup", 5, "--ema", 0.9, "--log-every", 3, "--checkpoint-every", 2, "--keep-checkpoints", 1,
        "--sample-every", 10,
    ]  # fmt: skip
    return [sys.executable, "-m", "ard", "distill", *map(str, options)]


def test_a_killed_run_ends_as_if_it_had_not_been(recording: RecordConfig, tmp_path: Path) -> None:
    """SIGKILL three times: in the writing of a checkpoint, and at random moments; then to the end."""
    distill(_config(recording, tmp_path / "whole", _KILLED, head=None))
    out = tmp_path / "killed"
    checkpoints, rng = out / "checkpoints", random.Random(0)
    reached: list[str] = []
    for kill in range(3):
        process = subprocess.Popen(
            _command(recording, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        # Once it has gone on by a checkpoint: at the first temporary folder, or up to 0.2 s later.
        before = {path.name for path in checkpoints.glob("step-*")}
        while process.poll() is None and {path.name for path in checkpoints.glob("step-*")} <= before:
            time.sleep(0.001)
        if kill == 0:
            while process.poll() is None and not [*checkpoints.glob(".step-*.tmp")]:
                pass
        else:
            time.sleep(0.2 * rng.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        reached += [path.name for path in checkpoints.glob("step-*")][-1:]
    assert reached == sorted(set(reached)), "a run that went on did not get further"
    distill(_config(recording, out, _KILLED, head=None))
    for name in (
        "student/model.safetensors",
        "student/config.json",
        "log.jsonl",
        "samples/step-00000100.png",
    ):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000100"]
    assert not [*out.rglob("*.tmp")], "remains of a killed write"


def test_the_scale_of_fp16_survives(tmp_path: Path) -> None:
    """A loss scale that overflows have lowered, and its count of good steps, as a checkpoint's tensors."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=3)
    weight = torch.ones(1, requires_grad=True)
    optimiser = torch.optim.SGD([weight], 0.1)
    for gradient in (2.0**80, 2.0**80, 1.0):
        scaler.scale(gradient * weight.sum()).backward()
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
    wanted = scaler.state_dict()
    assert (wanted["scale"], wanted["_growth_tracker"]) == (2.0**58, 1)
    write_tensors(tmp_path / "scaler.safetensors", _scaler_tensors(scaler))
    other = torch.amp.GradScaler("cpu")
    _load_scaler(other, read_tensors(tmp_path / "scaler.safetensors"))
    got = other.state_dict()
    assert got == wanted
    assert {name: type(value) for name, value in got.items()} == {n: type(v) for n, v in wanted.items()}


def test_a_finished_run_is_not_trained_again(recording: RecordConfig, tmp_path: Path) -> None:
    distill(_config(recording, tmp_path))
    weights, log = _weights(tmp_path), _log(tmp_path)
    shutil.rmtree(tmp_path / "student")
    distill(_config(recording, tmp_path))
    assert all(torch.equal(value, weights[name]) for name, value in _weights(tmp_path).items())
    assert _log(tmp_path) == log


def test_accumulation_equals_one_batch(recording: RecordConfig, tmp_path: Path) -> None:
    """Means over equal parts average to the mean over all; float32 sums in another order."""
    for accumulate in (1, 4):
        o = replace(_SHORT, accumulate=accumulate, iterations=1)
        distill(_config(recording, tmp_path / str(accumulate), o))
    one, four = (_log(tmp_path / name)[0] for name in ("1", "4"))
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert four["terms"] == pytest.approx(one["terms"], rel=1e-6)
    # Before Adam, which turns the sign of a rounding error into a whole step; norm sees every gradient.
    assert four["norm"] == pytest.approx(one["norm"], rel=1e-5)
    moments = [
        load_file(tmp_path / name / "checkpoints" / "step-00000001" / "optimiser.safetensors")
        for name in "14"
    ]
    for name, value in moments[0].items():
        if name.endswith("exp_avg"):
            torch.testing.assert_close(moments[1][name], value, rtol=1e-4, atol=1e-6)


def test_the_average_is_that_of_the_weights(recording: RecordConfig, tmp_path: Path) -> None:
    """average <- d average + (1 - d) weights after every step, d = min(ema, (1 + step) / (10 + step))."""
    o = replace(_SHORT, checkpoint_every=1, keep_checkpoints=100, ema=0.3)
    distill(_config(recording, tmp_path, o))
    initial, _ = load_teacher(recording.teacher)
    expected = initial.blocks[0].attn.qkv.weight.double()  # type: ignore[union-attr]
    name = "blocks.0.attn.qkv.weight"
    for step in range(o.iterations):
        folder = tmp_path / "checkpoints" / f"step-{step + 1:08d}"
        decay = min(0.3, (1 + step) / (10 + step))
        weight = read_tensors(folder / "model.safetensors")[name]
        expected = decay * expected + (1 - decay) * weight.double()
        got = read_tensors(folder / "ema.safetensors")[name]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(_weights(tmp_path)[name], got)
    assert not torch.equal(got, weight)


def test_learning_rates() -> None:
    constant = replace(_SHORT, lr=2.0, iterations=100)
    assert [learning_rate(constant, step) for step in (0, 50, 99)] == [2.0, 2.0, 2.0]
    warm = replace(constant, warmup=4)
    assert [learning_rate(warm, step) for step in range(6)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    cosine = replace(constant, lr_schedule="cosine")
    assert [learning_rate(cosine, step) for step in (0, 50, 100)] == pytest.approx([2.0, 1.0, 0.0])
    assert learning_rate(cosine, 25) == pytest.approx(1 + math.cos(math.pi / 4))


def test_the_learning_rate_is_the_one_that_is_used(recording: RecordConfig, tmp_path: Path) -> None:
    """Adam's first step moves every weight with a gradient by the learning rate."""
    distill(_config(recording, tmp_path, replace(_SHORT, iterations=1, lr=1e-3, warmup=9, clip=1e9)))
    assert _log(tmp_path)[0]["lr"] == pytest.approx(1e-4)
    moved = read_tensors(tmp_path / "checkpoints" / "step-00000001" / "model.safetensors")
    start = load_teacher(recording.teacher)[0].state_dict()
    name = "blocks.1.mlp.fc2.weight"
    change = (moved[name] - start[name]).abs()
    assert change.median() == pytest.approx(1e-4, rel=1e-2)


def test_a_folder_with_another_configuration_is_refused(recording: RecordConfig, tmp_path: Path) -> None:
    distill(_config(recording, tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for changed in (
        _config(recording, tmp_path, steps=2),
        _config(recording, tmp_path, replace(_SHORT, lr=2e-3)),
    ):
        with pytest.raises(ValueError, match=r"holds a run with another configuration.*name another folder"):
            distill(changed)
    with pytest.raises(ValueError, match="holds a run of `ard distill`, not of `ard train-teacher`"):
        train_teacher(TrainTeacherConfig(tmp_path, dataset="digits", optimisation=_SHORT))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_message_names_what_differs_and_nothing_else(recording: RecordConfig, tmp_path: Path) -> None:
    distill(_config(recording, tmp_path))
    with pytest.raises(ValueError, match=r"configuration \(clip was 1\.0, is 2\.0; steps was 4, is 2\);"):
        distill(_config(recording, tmp_path, replace(_SHORT, clip=2.0), steps=2))


def test_a_run_is_made_longer(recording: RecordConfig, tmp_path: Path) -> None:
    """At a constant learning rate it ends with the bits of one that was asked for all at once; how often it
    logs, saves and shows may change on the way."""
    longer = replace(_SHORT, iterations=9, log_every=1, checkpoint_every=2, keep_checkpoints=1)
    distill(_config(recording, tmp_path / "once", longer))
    distill(_config(recording, tmp_path / "twice"))
    short = _weights(tmp_path / "twice")
    distill(_config(recording, tmp_path / "twice", longer))
    once, twice = (_weights(tmp_path / name) for name in ("once", "twice"))
    assert all(torch.equal(value, twice[name]) for name, value in once.items())
    assert not all(torch.equal(value, short[name]) for name, value in once.items())
    assert (
        json.loads((tmp_path / "twice" / "run.json").read_text())["config"]["optimisation"]["iterations"] == 9
    )
    with pytest.raises(ValueError, match=r"iterations was 9, is 6\)"):
        distill(_config(recording, tmp_path / "twice"))
    cosine = replace(_SHORT, lr_schedule="cosine")
    distill(_config(recording, tmp_path / "cosine", cosine))
    with pytest.raises(ValueError, match=r"iterations was 6, is 7\)"):
        distill(_config(recording, tmp_path / "cosine", replace(cosine, iterations=7)))


def _stopped(out: Path) -> Path:
    """A run as it was after its third step."""
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    shutil.rmtree(out / "student")
    return out


def test_a_run_goes_on_elsewhere(recording: RecordConfig, tmp_path: Path) -> None:
    """With the run, the teacher and the trajectories on another disk; not on other trajectories."""
    config = _config(recording, tmp_path / "here")
    distill(config)
    there = replace(
        config, out=_stopped(shutil.copytree(config.out, tmp_path / "run")),
        teacher=shutil.copytree(recording.teacher, tmp_path / "teacher"),
        trajectories=shutil.copytree(recording.out, tmp_path / "trajectories"),
    )  # fmt: skip
    distill(there)
    assert all(torch.equal(value, _weights(there.out)[name]) for name, value in _weights(config.out).items())
    shutil.rmtree(tmp_path / "trajectories")
    record(replace(recording, out=tmp_path / "trajectories", seed=1))
    with pytest.raises(ValueError, match=r"trajectories was 'sha256:\w{64}', is 'sha256:\w{64}'\)"):
        distill(there)


def test_a_run_goes_on_in_smaller_parts(recording: RecordConfig, tmp_path: Path) -> None:
    config = _config(recording, tmp_path / "whole")
    distill(config)
    out = _stopped(shutil.copytree(config.out, tmp_path / "parts"))
    distill(replace(config, out=out, optimisation=replace(_SHORT, accumulate=2, checkpointing=True)))
    for name, value in _weights(config.out).items():
        torch.testing.assert_close(_weights(out)[name], value, rtol=1e-4, atol=1e-5)


def test_a_run_that_goes_on_lets_go_of_its_checkpoint(
    recording: RecordConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are mapped: a mapped file keeps its disk space when removed, and on NFS its folder."""
    config = _config(recording, tmp_path, replace(_SHORT, sample_every=1))
    distill(config)
    loaded: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    load, preview = training.newest_checkpoint, distilling.image_grid

    def loading(folder: Path) -> Any:
        found = load(folder)
        assert found is not None
        loaded.extend(weakref.ref(x) for group in found[1].values() for x in group.values())
        return found

    def spied(images: torch.Tensor, columns: int) -> torch.Tensor:
        alive.append(sum(x() is not None for x in loaded))
        return preview(images, columns=columns)

    monkeypatch.setattr(training, "newest_checkpoint", loading)
    monkeypatch.setattr(distilling, "image_grid", spied)
    _stopped(tmp_path)
    distill(config)
    assert len(loaded) > 100
    assert alive == [0] * 3


def test_processes_that_see_different_checkpoints_stop(
    recording: RecordConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the folder is each machine's own, they would train different steps and wait for each other."""
    distill(_config(recording, tmp_path))
    _stopped(tmp_path)
    gather = Accelerator.gather
    monkeypatch.setattr(Accelerator, "gather", lambda self, x: torch.cat([gather(self, x), 0 * x]))
    with pytest.raises(ValueError, match=r"find checkpoints of steps \[0, 3\] there, accepted"):
        distill(_config(recording, tmp_path))


def test_xt_states_that_are_the_noise_are_refused(recording: RecordConfig, tmp_path: Path) -> None:
    """Of every step the first xt is the noise; the first x0 is not."""
    store = replace(recording, out=tmp_path / "store", solver_steps=4, keep="all", samples=8)
    record(store)
    config = replace(_config(recording, tmp_path / "run", state="xt"), trajectories=store.out)
    with pytest.raises(ValueError, match=r"grid is \(4, 3, 2, 1, 0\), .* position 3 is the noise itself"):
        distill(config)
    assert not config.out.exists()
    states, _ = TrajectoryStore(store.out).states(torch.arange(8), (4, 3, 2, 1, 0), "xt")
    assert torch.equal(states[:, 0], states[:, 1])
    distill(replace(config, steps=3, grid=(4, 2, 1, 0)))
    distill(replace(config, state="x0", out=tmp_path / "x0"))


def test_clip_0_does_not_clip(recording: RecordConfig, tmp_path: Path) -> None:
    for clip in (0, 1e9, 1e-3):
        distill(_config(recording, tmp_path / str(clip), replace(_SHORT, iterations=2, clip=clip)))
    none, large, small = (_weights(tmp_path / str(clip)) for clip in (0, 1e9, 1e-3))
    assert all(torch.equal(value, large[name]) for name, value in none.items())
    assert not all(torch.equal(value, small[name]) for name, value in none.items())
    assert _log(tmp_path / "0")[-1]["norm"] == _log(tmp_path / "1000000000.0")[-1]["norm"] > 0


def test_a_damaged_checkpoint_is_refused(recording: RecordConfig, tmp_path: Path) -> None:
    distill(_config(recording, tmp_path))
    path = tmp_path / "checkpoints" / "step-00000006" / "ema.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"ema\.safetensors: does not match its checksum; remove .*step-00000006"
    ):
        distill(_config(recording, tmp_path))
    shutil.rmtree(path.parent)
    distill(_config(recording, tmp_path))  # from step 3


@pytest.mark.parametrize(
    "options",
    [{"steps": 1}, {"steps": 4, "history_layers": 0}, {"state": "xt", "mask": "window"},
     {"per_step_final": False}, {"steps": 2, "grid": (25, 20, 0), "mask": "anchor"}],
    ids=["KD", "step distillation", "xt and window", "shared final layer", "grid and anchor"],
)  # fmt: skip
def test_variants_learn(recording: RecordConfig, tmp_path: Path, options: dict[str, object]) -> None:
    """The loss falls by a tenth at least in 30 steps on 44 trajectories, and the student says what it is."""
    o = replace(_SHORT, iterations=30, log_every=1, checkpoint_every=30)
    distill(_config(recording, tmp_path, o, **options))
    losses = [line["loss"] for line in _log(tmp_path)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    student, trained = load_student(tmp_path / "student")
    assert student.steps == options.get("steps", 4)
    assert student.history_layers == options.get("history_layers", 2)
    assert trained["grid"] == list(TrajectoryStore(recording.out).grid(student.steps, options.get("grid")))  # type: ignore[arg-type]
    assert trained["state"] == options.get("state", "x0")


def test_checkpointing_changes_nothing_and_bf16_little(recording: RecordConfig, tmp_path: Path) -> None:
    plain = replace(_SHORT, log_every=1)
    for name, o in {
        "plain": plain,
        "checkpointing": replace(plain, checkpointing=True),
        "bf16": replace(plain, precision="bf16"),
    }.items():
        AcceleratorState._reset_state()
        distill(_config(recording, tmp_path / name, o))
    assert _log(tmp_path / "checkpointing") == _log(tmp_path / "plain")
    assert _log(tmp_path / "bf16") != _log(tmp_path / "plain")
    for got, wanted in zip(_log(tmp_path / "bf16"), _log(tmp_path / "plain"), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=4 * torch.finfo(torch.bfloat16).eps)
    assert all(value.dtype == torch.float32 for value in _weights(tmp_path / "bf16").values())


@pytest.mark.slow
def test_compiled_training_is_training(recording: RecordConfig, tmp_path: Path) -> None:
    for name, o in {"plain": _SHORT, "compiled": replace(_SHORT, compile=True)}.items():
        distill(_config(recording, tmp_path / name, o))
    for got, wanted in zip(_log(tmp_path / "compiled"), _log(tmp_path / "plain"), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert set(_weights(tmp_path / "compiled")) == set(_weights(tmp_path / "plain"))


def test_a_rollout_trains_on_the_own_states(recording: RecordConfig, tmp_path: Path) -> None:
    """Share 1: every input but the noise is the student's own, the targets are the teacher's; share 0.5:
    about half of the samples; which ones depends on their position alone."""
    o = replace(_SHORT, iterations=1, batch_size=44, log_every=1)
    for name, share in (("teacher", 0.0), ("half", 0.5), ("own", 1.0)):
        distill(_config(recording, tmp_path / name, o, rollout=share))
    store = TrajectoryStore(recording.out)
    student = ARDTransformer.from_teacher(load_teacher(recording.teacher)[0], 4, 2)
    states, labels = store.states(shuffled(0, 44, 44, 0), store.grid(4), "x0")
    own = torch.cat([states[:, :1], sample(student, states[:, 0], labels)[:, :-1]], 1)
    chosen = index_uniform(torch.arange(44), 0, Stream.ROLLOUT) < 0.5
    assert 11 <= int(chosen.sum()) <= 33
    for name, rows in (("teacher", chosen & ~chosen), ("half", chosen), ("own", chosen | ~chosen)):
        inputs = torch.where(rows.view(-1, 1, 1, 1, 1), own, states[:, :-1])
        with torch.no_grad():
            loss, terms = trajectory_loss(student(inputs, labels), states)
        assert _log(tmp_path / name)[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert _log(tmp_path / name)[0]["terms"] == pytest.approx(terms.tolist(), rel=1e-5)
    assert _log(tmp_path / "own")[0]["loss"] != pytest.approx(_log(tmp_path / "teacher")[0]["loss"], rel=1e-3)


def test_a_live_teacher_makes_what_it_would_have_recorded(recording: RecordConfig, tmp_path: Path) -> None:
    """Without trajectories, step n trains on samples n B to (n+1) B of a recording that never ends."""
    o = replace(_SHORT, iterations=2, log_every=1)
    live = replace(
        _config(recording, tmp_path / "live", o, guidance=2.0, solver="heun", solver_steps=4),
        trajectories=None,
    )
    distill(live)
    stored = replace(recording, out=tmp_path / "store", samples=16, solver="heun", solver_steps=4,
                     guidance=2.0, dtype="float32", keep="all")  # fmt: skip
    record(stored)
    store = TrajectoryStore(stored.out)
    grid = store.grid(4)
    student = ARDTransformer.from_teacher(load_teacher(recording.teacher)[0], 4, 2)
    states, labels = store.states(torch.arange(8), grid, "x0")
    with torch.no_grad():
        loss, _ = trajectory_loss(student(states[:, :-1], labels), states)
    log = _log(tmp_path / "live")
    assert log[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    weights = read_tensors(tmp_path / "live" / "checkpoints" / "step-00000002" / "model.safetensors")
    _, trained = load_student(tmp_path / "live" / "student")
    assert (trained["solver"], trained["solver_steps"], trained["guidance"]) == ("heun", 4, 2.0)
    assert trained["samples"] is None
    # Once more from the first checkpoint: the second step sees the same samples again.
    shutil.rmtree(tmp_path / "live" / "student")
    again = replace(live, optimisation=replace(o, checkpoint_every=1), out=tmp_path / "again")
    distill(again)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000002")
    distill(again)
    for name, value in read_tensors(
        tmp_path / "again" / "checkpoints" / "step-00000002" / "model.safetensors"
    ).items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize(("schedule", "scale"), [("flow-to-noise", 1000.0), ("flow-to-data", 1.0)])
def test_a_flow_teacher_is_trained_and_distilled(tmp_path: Path, schedule: Schedule, scale: float) -> None:
    """Its student is conditioned on times of the teacher's own scale and direction."""
    o = replace(_SHORT, iterations=60, batch_size=16, log_every=1, checkpoint_every=60, lr=3e-3)
    train_teacher(
        TrainTeacherConfig(tmp_path / "run", "digits", width=32, depth=2, heads=2, noise_schedule=schedule,
                           prediction="velocity", time_scale=scale, optimisation=o)
    )  # fmt: skip
    losses = [line["loss"] for line in _log(tmp_path / "run")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    AcceleratorState._reset_state()
    config = DistillConfig(
        tmp_path / "run" / "teacher", tmp_path / "student", solver_steps=4, history_layers=1, head="direct",
        optimisation=replace(_SHORT, iterations=1),
    )  # fmt: skip
    distill(config)
    student, trained = load_student(tmp_path / "student" / "student")
    wanted = [1000.0, 750.0, 500.0, 250.0] if schedule == "flow-to-noise" else [0.0, 0.25, 0.5, 0.75]
    assert student.times.tolist() == wanted
    assert trained["diffusion"]["schedule"] == schedule


def test_sharded_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ValueError, match="accelerate is set up for FSDP, accepted is DDP"):
        accelerator_for(Optimisation())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8, "accumulate": 3}, r"batch_size is 8, accepted are multiples of .* \(1 x 3\)"),
        ({"log_every": 0}, "log_every is 0, accepted is an integer >= 1"),
        ({"iterations": 0}, "iterations is 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"ema": 1.0}, r"ema is 1\.0, accepted is a decay in \[0, 1\)"),
    ],
)
def test_options_that_cannot_work_leave_no_run(
    recording: RecordConfig, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distill(_config(recording, tmp_path / "run", replace(_SHORT, **change)))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_every_step_draws_noise_of_its_own(tmp_path: Path) -> None:
    """From the seed and the step: the same in every run of a seed, another one in every step and for other
    seeds."""

    def drawn(name: str, seed: int) -> list[float]:
        seen = []

        def loss_of(
            model: nn.Module, batch: Batch, step: int
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            seen.append(float(torch.rand(())))
            return model(batch[0]).mean(), {}

        o = replace(_SHORT, seed=seed)
        fit(
            Run(tmp_path / name, "test", o), accelerator_for(o), nn.Linear(2, 1), o,
            lambda positions: (torch.ones(len(positions), 2),), loss_of, lambda _: torch.empty(0),
        )  # fmt: skip
        return seen

    first = drawn("a", 0)
    assert len(set(first)) == _SHORT.iterations
    assert drawn("b", 0) == first
    assert not set(drawn("c", 1)) & set(first)


def test_a_teacher_learns_and_goes_on(tmp_path: Path) -> None:
    """A teacher of 4 + 4 steps is the teacher of 8 steps: its noise, times and dropped classes depend on the
    step."""
    o = Optimisation(
        iterations=8, batch_size=16, ema=0.5, log_every=1, checkpoint_every=4, keep_checkpoints=9,
        sample_every=4
    )  # fmt: skip
    config = TrainTeacherConfig(
        tmp_path / "whole", "digits", width=32, depth=2, heads=2, prediction="v", optimisation=o
    )
    train_teacher(config)
    shutil.copytree(config.out, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000008")
    shutil.rmtree(tmp_path / "half" / "teacher")
    train_teacher(replace(config, out=tmp_path / "half"))
    for name in ("teacher/model.safetensors", "log.jsonl", "samples/step-00000008.png"):
        assert (tmp_path / "half" / name).read_bytes() == (config.out / name).read_bytes(), name
    model, diffusion = load_teacher(config.out / "teacher")
    assert diffusion.config == {"schedule": "linear", "prediction": "v", "timesteps": 1000}
    assert model.num_classes == 10
    noise = index_noise(torch.arange(2), (1, 28, 28), 0)
    assert model(noise, torch.tensor([10, 900]), torch.tensor([3, 10])).isfinite().all()
