"""Sampling feeds a student its own predictions; a sample depends on its index, its class and the seed
alone."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import ard
from ard import sampling
from ard.checkpoints import load_student, load_teacher, save_student
from ard.data import Stream, index_noise, to_uint8
from ard.evaluation import EvaluateConfig, evaluate
from ard.models import ARDTransformer
from ard.recording import RecordConfig
from ard.sampling import SampleConfig, run
from ard.trajectories import TrajectoryStore
from ard_kernels import use_backend


@pytest.fixture(scope="module")
def model(student: Path) -> ARDTransformer:
    return load_student(student)[0]


def _npz(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["labels"]


def test_a_path_is_the_fixed_point_of_the_training_pass(model: ARDTransformer) -> None:
    """Fed with its own path in one teacher-forced pass, the student predicts that path."""
    noise, labels = index_noise(torch.arange(3), (1, 28, 28), 0), torch.tensor([0, 4, 9])
    path = ard.sample(model, noise, labels)
    assert path.shape == (3, 4, 1, 28, 28)
    states = torch.cat([noise.unsqueeze(1), path[:, :-1]], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(states, labels), path, rtol=1e-4, atol=1e-5)
    # Each step, the class and the history matter, or the comparison says nothing.
    assert path.diff(dim=1).abs().amax((0, 2, 3, 4)).min() > 1e-2
    assert (ard.sample(model, noise, labels.flip(0)) - path)[0].abs().max() > 1e-2
    with torch.no_grad():
        assert (model(states[:, [1, 1, 2, 3]], labels) - path)[:, -1].abs().max() > 1e-3


def test_sampling_keeps_the_dtype_of_the_noise_and_no_graph(model: ARDTransformer) -> None:
    noise, labels = index_noise(torch.arange(2), (1, 28, 28), 0), torch.tensor([1, 2])
    exact = ard.sample(model, noise, labels)
    assert not exact.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        rough = ard.sample(model, noise, labels)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    # Roundings of 2 layers and 4 steps; 0.03 was measured.
    assert (rough - exact).norm() / exact.norm() < 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 1, 28, 27), [0, 1], r"noise has shape \(2, 1, 28, 27\), accepted is \(B, 1, 28, 28\)"),
        ((2, 28, 28), [0, 1], r"accepted is \(B, 1, 28, 28\)"),
        ((2, 1, 28, 28), [0], r"labels has shape \(1,\), accepted is \(2,\), one per sample"),
        ((2, 1, 28, 28), [0, 10], r"labels are 0\.\.10, accepted are 0\.\.9"),
        ((2, 1, 28, 28), [-1, 1], r"labels are -1\.\.1, accepted are 0\.\.9"),
    ],
)
def test_what_does_not_fit_is_named(
    model: ARDTransformer, shape: tuple[int, ...], labels: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ard.sample(model, torch.zeros(shape), torch.tensor(labels))


def test_what_is_no_student_or_tensor_is_named(model: ARDTransformer, teacher: Path) -> None:
    noise, labels = torch.zeros(2, 1, 28, 28), torch.tensor([0, 1])
    narrow = copy.deepcopy(model).bfloat16()
    for arguments, message in (
        ((load_teacher(teacher)[0], noise, labels), "student is DiT, accepted is an ARDTransformer"),
        ((model, noise.numpy(), labels), "noise is ndarray, accepted is a Tensor"),
        ((model, noise, [0, 1]), "labels is list, accepted is a Tensor"),
        (
            (model, noise.int(), labels),
            r"noise is torch\.int32, accepted is torch\.float32 as the weights are",
        ),
        ((narrow, noise, labels), r"noise is torch\.float32, accepted is torch\.bfloat16 as the weights are"),
        ((model, noise, labels.float()), r"labels is torch\.float32, accepted are int64 and int32"),
        ((model, noise.to("meta"), labels), "noise is on meta, accepted is cpu, where the weights are"),
        ((model, noise, labels.to("meta")), "labels is on meta, accepted is cpu, where the weights are"),
    ):
        with pytest.raises(ValueError, match="^sample: " + message):
            ard.sample(*arguments)  # type: ignore[arg-type]
    assert ard.sample(narrow, noise.bfloat16(), labels).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert ard.sample(narrow, noise, labels).dtype == torch.float32
    torch.testing.assert_close(
        ard.sample(torch.compile(model, backend="eager"), noise, labels), ard.sample(model, noise, labels)
    )


def test_files_hold_the_samples(model: ARDTransformer, student: Path, tmp_path: Path) -> None:
    run(SampleConfig(student, tmp_path, samples=12, labels=(7, 2), batch_size=5, seed=3, precision="no"))
    images, labels = _npz(tmp_path)
    assert labels.tolist() == [7, 2] * 6
    noise = index_noise(torch.arange(12), (1, 28, 28), 3, Stream.SAMPLE)
    expected = ard.sample(model, noise, torch.from_numpy(labels))[:, -1]
    assert images.dtype == np.uint8
    assert images.shape == (12, 28, 28, 1)
    # A value beside a rounding boundary may fall to either side when the batch is another one.
    assert np.abs(images.astype(int) - to_uint8(expected).permute(0, 2, 3, 1).numpy()).max() <= 1
    with Image.open(tmp_path / "samples.png") as picture:
        grid = np.asarray(picture)[::2, ::2]  # zoomed by 2
    assert grid.shape == (2 * 30 - 2, 10 * 30 - 2)
    assert np.array_equal(grid[30:58, 30:58], images[11, :, :, 0])


def test_a_student_that_predicts_nan_is_refused(
    student: Path, recording: RecordConfig, tmp_path: Path
) -> None:
    broken, trained = load_student(student)
    with torch.no_grad():
        broken.final_layers[3].linear.weight.fill_(3e38)  # finite, unlike what comes of it
    save_student(tmp_path / "broken", broken, trained)
    with pytest.raises(ValueError, match="broken: the student's predictions are not finite"):
        run(SampleConfig(tmp_path / "broken", tmp_path / "samples", samples=4))
    with pytest.raises(ValueError, match="broken: the student's predictions are not finite"):
        evaluate(EvaluateConfig(tmp_path / "broken", recording.out, out=tmp_path / "report"))
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "report").exists()


def test_a_file_in_the_way_is_named_before_anything_is_sampled(student: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"sample: out is .*file, a file; accepted is a folder"):
        run(SampleConfig(student, tmp_path / "file"))


def test_samples_depend_on_the_seed_and_not_on_the_batch(student: Path, tmp_path: Path) -> None:
    config = SampleConfig(student, tmp_path / "a", samples=7, latents=True, precision="no")
    run(config)
    run(replace(config, out=tmp_path / "b"))
    run(replace(config, out=tmp_path / "c", batch_size=2))
    run(replace(config, out=tmp_path / "d", seed=1))
    first, labels = _npz(tmp_path / "a")
    assert first.dtype == np.float32
    assert first.shape == (7, 1, 28, 28)
    assert labels.tolist() == list(range(7))
    assert (tmp_path / "a" / "samples.npz").read_bytes() == (tmp_path / "b" / "samples.npz").read_bytes()
    assert np.allclose(first, _npz(tmp_path / "c")[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(first, _npz(tmp_path / "d")[0], atol=1e-1)


def test_samples_are_not_made_of_the_noise_of_trajectories(
    model: ARDTransformer, student: Path, store: TrajectoryStore, tmp_path: Path
) -> None:
    run(SampleConfig(student, tmp_path, samples=5, latents=True, seed=store.manifest["seed"]))
    states, labels = store.states(torch.arange(5), store.grid(4), "x0")
    trained, seen = ard.sample(model, states[:, 0], labels)[:, -1], _npz(tmp_path)
    assert np.array_equal(seen[1], labels)
    assert not np.isclose(seen[0], trained.numpy(), atol=1e-2).all((1, 2, 3)).any()


def _inputs(batch: int, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(seed, seed + batch) % 10
    return index_noise(torch.arange(batch), (1, 28, 28), seed).to(device), labels.to(device)


def test_a_cuda_graph_needs_a_gpu_and_says_so(model: ARDTransformer) -> None:
    noise, labels = _inputs(2)
    with pytest.raises(ValueError, match=r"cuda_graph is True, .* noise is on cpu, .* accepted is one CUDA"):
        ard.sample(model, noise, labels, cuda_graph=True)
    exact = ard.sample(model, noise, labels, cuda_graph=False)
    for _ in range(3):
        assert torch.equal(ard.sample(model, noise, labels), exact)


class _PretendGraph:
    """Stands where a CUDA graph would, and shows when one is recorded."""

    recorded: ClassVar[list[tuple[int, ...]]] = []
    alive: ClassVar[weakref.WeakSet[_PretendGraph]] = weakref.WeakSet()

    def __init__(self, student: ARDTransformer, noise: torch.Tensor, labels: torch.Tensor) -> None:
        self.recorded.append(tuple(noise.shape))
        self.alive.add(self)

    def replay(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(noise), 4, 1, 28, 28), 7.0)


@pytest.fixture
def pretend(model: ARDTransformer, monkeypatch: pytest.MonkeyPatch) -> ARDTransformer:
    """A student of its own, on a machine that seems to have a GPU."""
    monkeypatch.setattr(_PretendGraph, "recorded", [])
    monkeypatch.setattr(sampling, "_Graph", _PretendGraph)
    monkeypatch.setattr(sampling, "_unsafe", lambda noise, labels: None)
    monkeypatch.setattr(sampling, "_key", lambda noise, labels: tuple(noise.shape))
    return copy.deepcopy(model)


def _replayed(student: ARDTransformer, batch: int = 2, cuda_graph: bool | None = None) -> bool:
    return bool((ard.sample(student, *_inputs(batch), cuda_graph=cuda_graph) == 7).all())


def test_graphs_are_recorded_when_worth_it_and_only_then(pretend: ARDTransformer) -> None:
    assert [_replayed(pretend) for _ in range(4)] == [False, True, True, True]
    assert _PretendGraph.recorded == [(2, 1, 28, 28)]
    assert _replayed(pretend, 3, cuda_graph=True)
    assert not _replayed(pretend, 3, cuda_graph=False)
    assert _PretendGraph.recorded == [(2, 1, 28, 28), (3, 1, 28, 28)]


def test_a_graph_follows_its_weights(pretend: ARDTransformer) -> None:
    assert _replayed(pretend, cuda_graph=True)
    with torch.no_grad():
        pretend.blocks[0].mlp.fc1.weight.mul_(2)  # type: ignore[union-attr]
    assert _replayed(pretend)
    assert len(_PretendGraph.recorded) == 1
    pretend.load_state_dict(copy.deepcopy(pretend.state_dict()), assign=True)
    assert [_replayed(pretend), _replayed(pretend)] == [False, True]
    pretend.blocks[1].mlp = copy.deepcopy(pretend.blocks[1].mlp)
    assert [_replayed(pretend), _replayed(pretend)] == [False, True]
    assert len(_PretendGraph.alive) == 1


def test_a_hook_sees_every_pass(pretend: ARDTransformer) -> None:
    seen = []
    handle = pretend.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    assert [_replayed(pretend) for _ in range(3)] == [False] * 3
    assert len(seen) == 3 * 4
    with pytest.raises(ValueError, match=r"cuda_graph is True, .* a forward hook"):
        _replayed(pretend, cuda_graph=True)
    handle.remove()
    assert _replayed(pretend, cuda_graph=True)


def test_graphs_are_few_and_end_with_their_student(pretend: ARDTransformer) -> None:
    for batch in range(1, 9):
        assert _replayed(pretend, batch, cuda_graph=True)
    gc.collect()
    assert len(_PretendGraph.alive) == 4
    student = copy.deepcopy(pretend)
    assert _replayed(student, cuda_graph=True)
    assert len(_PretendGraph.alive) == 5
    del student
    gc.collect()
    assert len(_PretendGraph.alive) == 4


def test_a_pass_that_cannot_be_recorded_runs_without_and_is_reported_once(
    pretend: ARDTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(sampling, "_Graph", fail)
    assert not _replayed(pretend)
    with pytest.warns(UserWarning, match=r"runs without a CUDA graph, .* not permitted"):
        assert not _replayed(pretend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _replayed(pretend)
    with pytest.raises(RuntimeError, match="not permitted"):
        _replayed(pretend, cuda_graph=True)


@pytest.mark.gpu
def test_a_cuda_graph_is_of_its_settings(model: ARDTransformer) -> None:
    """What chooses the kernels changes between calls with the same shapes."""
    student, (noise, labels) = copy.deepcopy(model).cuda(), _inputs(3, 0, "cuda")
    results = []
    for enabled, backend in ((False, None), (True, None), (True, "eager"), (False, None), (True, None)):
        forced = contextlib.nullcontext() if backend is None else use_backend(backend)
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled), forced:
            exact = ard.sample(student, noise, labels, cuda_graph=False)
            for graph in (None, None, True):
                assert torch.equal(ard.sample(student, noise, labels, cuda_graph=graph), exact)
        results.append(exact)
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[4])


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_cuda_graph_gives_the_bits_of_the_eager_path(model: ARDTransformer, autocast: bool) -> None:
    student = copy.deepcopy(model).cuda()
    for change in (None, "in place", "moved"):
        with torch.no_grad():
            for parameter in student.parameters():
                if change == "in place":
                    parameter.mul_(1.01)
                elif change == "moved":
                    parameter.data = parameter.data.clone()
        for batch, seed in ((3, 0), (3, 1), (5, 2), (3, 3)):
            noise, labels = _inputs(batch, seed, "cuda")
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                exact = ard.sample(student, noise, labels, cuda_graph=False)
                assert torch.equal(ard.sample(student, noise, labels, cuda_graph=True), exact)
            # Outside of the autocast context in which the graph was recorded, after memory was given back.
            torch.cuda.empty_cache()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                assert torch.equal(ard.sample(student, noise, labels), exact)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        assert torch.equal(ard.sample(student, noise, labels), exact)
