"""Which steps are left out, what that leaves of them, and when a run stops."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from faults import Fault, faulty, train
from torch import Tensor, nn

from ard import skipping, training
from ard.checkpoints import read_tensors
from ard.distilling import DistillConfig
from ard.evaluation import TrainClassifierConfig
from ard.recording import RecordConfig
from ard.runs import Run, checkpoints, read_log
from ard.training import Batch, Optimisation, TrainTeacherConfig, accelerator_for, fit, learning_rate

_SHORT = Optimisation(
    iterations=12, batch_size=8, lr=1e-2, ema=0.8, precision="no", log_every=1, checkpoint_every=1,
    keep_checkpoints=99, sample_every=0,
)  # fmt: skip


def _fetch(positions: range) -> Batch:
    """Numbers that depend on the position alone."""
    at = torch.tensor(positions, dtype=torch.float64)
    return torch.stack([(at * 0.7).sin(), (at * 1.3).cos(), (at * 2.1).sin()], 1), (at * 0.5).sin()


def _loss(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    x, y = batch
    return (model(x).squeeze(1) - y).square().mean(), {}


class _Single(nn.Linear):
    """In float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def _model() -> nn.Linear:
    model = nn.Linear(3, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64))
        model.bias.fill_(0.1)
    return model


def _fit(out: Path, o: Optimisation, fault: Fault | None, model: nn.Module | None = None) -> nn.Module:
    AcceleratorState._reset_state()
    model = _model() if model is None else model
    loss_of = _loss if fault is None else faulty(fault, _loss)
    fit(Run(out, "distill", o), accelerator_for(o), model, o, _fetch, loss_of, None)
    return model


def _adam(o: Optimisation, left_out: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """AdamW of arXiv 1711.05101 (algorithm 2) on the same regression, in NumPy: weights and their average."""
    w = np.array([0.3, -0.2, 0.9, 0.1])
    average, m, v, count = w.copy(), np.zeros(4), np.zeros(4), 0
    for step in range(o.iterations):
        if step + 1 in left_out:
            continue
        x, y = (t.numpy() for t in _fetch(range(step * o.batch_size, (step + 1) * o.batch_size)))
        x = np.concatenate([x, np.ones((len(x), 1))], 1)
        gradient = 2 * x.T @ (x @ w - y) / len(x)
        gradient *= min(1.0, o.clip / (np.linalg.norm(gradient) + 1e-6))
        count += 1
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        lr = learning_rate(o, step)
        w = w * (1 - lr * o.weight_decay)
        w = w - lr * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
        decay = min(o.ema, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * w
    return w, average


@pytest.mark.parametrize(
    ("kind", "value"),
    [("gradient", math.nan), ("gradient", math.inf), ("gradient", 1e200), ("loss", math.nan),
     ("loss", -math.inf), ("both", math.nan)],
)  # fmt: skip
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_left_out_leaves_no_trace(
    kind: Any, value: float, accumulate: int, tmp_path: Path
) -> None:
    """Weights, moments, Adam's count and average go on as if it had not been; samples and learning rates as
    if it had. One bad pass of two, or a norm that overflows, is enough."""
    o = replace(_SHORT, lr_schedule="cosine", weight_decay=0.1, clip=0.5, accumulate=accumulate)
    steps = (1, 4, 5, 12)
    model = _fit(tmp_path, o, Fault(steps, kind, value, call=accumulate - 1))
    weights, average = _adam(o, steps)
    got = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    np.testing.assert_allclose(got, weights, rtol=1e-12)
    ema = read_tensors(tmp_path / "checkpoints" / "step-00000012" / "ema.safetensors")
    np.testing.assert_allclose(np.append(ema["weight"], ema["bias"]), average, rtol=1e-5)
    assert not np.allclose(got, _adam(o, ())[0], rtol=1e-3)
    assert [line.get("skipped", 0) for line in read_log(tmp_path)] == [1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4]


def test_every_step_that_is_left_out_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _fit(tmp_path / "run", replace(_SHORT, log_every=5), Fault((2, 3, 9), "loss"))
    _fit(tmp_path / "other", replace(_SHORT, log_every=5), Fault((12,)))
    told = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "left out" in line]
    assert told == [
        *(f"run: step {n} is left out: the loss is not finite" for n in (2, 3, 9)),
        "other: step 12 is left out: the gradient is not finite, the loss is",
    ]


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("every", [1, 5])
def test_too_many_in_a_row_stop_the_run(limit: int, every: int, tmp_path: Path) -> None:
    """One more than are accepted; as many with a good step between them do not."""
    o = replace(_SHORT, max_skipped=limit, log_every=every, checkpoint_every=4)
    if limit:
        _fit(tmp_path / "good", o, Fault(tuple(n for n in range(1, 13) if n % (limit + 1)), "loss"))
    bad = tuple(range(6, 6 + limit + 1))
    newest = 8 if bad[-1] > 8 else 4
    with pytest.raises(ValueError, match=(
        rf"run: {limit + 1} steps in a row, up to step {bad[-1]}, were left out, accepted are {limit} "
        r"\(--max-skipped\): the gradient is not finite, the loss is; the newest checkpoint, "
        rf"of step {newest}, is finite"
    )):  # fmt: skip
        _fit(tmp_path / "run", o, Fault(bad))
    assert [step for step, _ in checkpoints(tmp_path / "run")][-1] == newest
    assert all(line["step"] < 6 + limit for line in read_log(tmp_path / "run"))


def test_a_run_that_stopped_before_its_first_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the loss is not finite; no checkpoint yet"):
        _fit(tmp_path, replace(_SHORT, max_skipped=2, checkpoint_every=12), Fault((1, 2, 3), "loss"))
    _fit(tmp_path, replace(_SHORT, max_skipped=2, checkpoint_every=12), None)


def test_the_counts_survive_a_stop(tmp_path: Path) -> None:
    """Those in a row, too: a run that goes on with the same fault stops where it stopped; it may be given
    more patience, and without the fault it ends like any other."""
    o = replace(_SHORT, max_skipped=3)
    fault = Fault((2, *range(6, 13)), "loss")
    for _ in range(2):
        with pytest.raises(ValueError, match="4 steps in a row, up to step 9, were left out"):
            _fit(tmp_path / "run", o, fault)
        assert [step for step, _ in checkpoints(tmp_path / "run")][-1] == 8
    patient = shutil.copytree(tmp_path / "run", tmp_path / "patient")
    _fit(patient, replace(o, max_skipped=7), fault)
    assert read_log(patient)[-1]["skipped"] == 8
    model = _fit(tmp_path / "run", o, None)
    got = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    np.testing.assert_allclose(got, _adam(o, (2, 6, 7, 8))[0], rtol=1e-12)
    assert read_log(tmp_path / "run")[-1]["skipped"] == 4


def test_a_checkpoint_of_a_run_without_faults_has_no_counts(tmp_path: Path) -> None:
    _fit(tmp_path, _SHORT, Fault((6,)))
    for step, path in checkpoints(tmp_path):
        groups = json.loads((path / "state.json").read_text())["sha256"]
        assert ("skipped" in groups) == (step >= 6)


def test_an_update_that_overflows_stops_the_run(tmp_path: Path) -> None:
    """Though loss and gradient are finite: a learning rate beyond the largest float32."""
    with pytest.raises(ValueError, match=(
        r"model after step 1: weight is not finite .*; all gradients were finite, updates are too large; try "
        "a new run with a lower --lr"
    )):  # fmt: skip
        _fit(tmp_path, replace(_SHORT, lr=1e39), None, _Single(3, 1))
    assert not [*tmp_path.rglob("*.safetensors")]


def test_the_host_reads_a_step_when_the_next_one_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU has work meanwhile; only a step whose values are logged, shown or saved is read at once."""
    events: list[str] = []
    later = skipping._later

    def spied(flags: Tensor) -> Callable[[], list[bool]]:
        step = sum(e.startswith("backward") for e in events)
        read = later(flags)
        return lambda: events.append(f"read {step}") or read()  # type: ignore[func-returns-value]

    backward = training._backward

    def counted(*of: Any) -> Any:
        events.append(f"backward {of[-1] + 1}")
        return backward(*of)

    monkeypatch.setattr(skipping, "_later", spied)
    monkeypatch.setattr(training, "_backward", counted)
    _fit(tmp_path, replace(_SHORT, iterations=6, log_every=4, checkpoint_every=6), None)
    assert events == [
        "backward 1", "backward 2", "read 1", "backward 3", "read 2", "backward 4", "read 3", "read 4",
        "backward 5", "backward 6", "read 5", "read 6",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_a_scale_of_fp16_comes_down_before_gradients_are_faults(
    kind: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From 4 by halves to 1 in two steps that are not counted; a loss that is not finite always is."""
    o = replace(_SHORT, precision="fp16", max_skipped=2)

    def scaled(out: Path, fault: Fault | None) -> None:
        AcceleratorState._reset_state()
        accelerator = accelerator_for(o)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=4.0)
        torch.manual_seed(0)
        loss_of = _loss if fault is None else faulty(fault, _loss)
        fit(Run(out, "distill", o), accelerator, _Single(3, 1), o, _fetch, loss_of, None)

    stops = 9 if kind == "gradient" else 7
    with pytest.raises(ValueError, match=rf"3 steps in a row, up to step {stops}, were left out"):
        scaled(tmp_path / "run", Fault(tuple(range(5, 13)), kind))
    assert [step for step, _ in checkpoints(tmp_path / "run")][-1] == stops - 1
    one, other = (
        {name: x for part in ("model", "ema", "optimiser")
         for name, x in read_tensors(
             tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors").items()}
        for step in (4, stops - 1)
    )  # fmt: skip
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert capfd.readouterr().err.count("is left out") == 3
    scaled(tmp_path / "run", None)
    assert checkpoints(tmp_path / "run")[-1][0] == 12


@pytest.mark.parametrize("command", ["train-teacher", "train-classifier"])
def test_the_other_commands_leave_out_steps_too(command: str, tmp_path: Path) -> None:
    o = replace(_SHORT, iterations=4, batch_size=4)
    config: Any = (
        TrainTeacherConfig(tmp_path, "digits", width=16, depth=1, heads=1, patch_size=14, optimisation=o)
        if command == "train-teacher"
        else TrainClassifierConfig(tmp_path, "digits", optimisation=o)
    )
    train(config, Fault((3,)))
    two, three, four = (
        read_tensors(tmp_path / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        for step in (2, 3, 4)
    )
    assert all(torch.equal(value, three[name]) for name, value in two.items())
    assert not all(torch.equal(value, four[name]) for name, value in two.items())
    assert [line.get("skipped") for line in read_log(tmp_path)] == [None, None, 1, 1]


def test_patience_is_no_other_configuration(recording: RecordConfig, tmp_path: Path) -> None:
    o = replace(_SHORT, iterations=1, lr_schedule="constant")
    config = DistillConfig(recording.teacher, tmp_path, recording.out, history_layers=2, optimisation=o)
    train(config, None)
    train(replace(config, optimisation=replace(o, iterations=2, max_skipped=0)), None)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    with pytest.raises(ValueError, match="max_skipped is -1, accepted is an integer >= 0"):
        train(replace(config, optimisation=replace(o, max_skipped=-1)), None)
