"""A recording is a function of its configuration, whoever makes it and however often it is stopped; damage is
found."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from damage import DAMAGES, damage
from safetensors.torch import load_file
from tiny import tiny_teacher
from torch import Tensor

from ard.checkpoints import load_teacher, read_json, save_teacher, write_json
from ard.data import index_noise
from ard.diffusion import Diffusion, Solver, guided
from ard.grids import chosen_grid
from ard.models import DiT
from ard.recording import RecordConfig, record
from ard.trajectories import LiveTrajectories, SolverConfig, TrajectoryStore


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _command(config: RecordConfig, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "ard", "record", "--teacher", str(config.teacher), "--out", str(out),
        "--samples", str(config.samples), "--shard-size", str(config.shard_size),
        "--batch-size", str(config.batch_size), "--precision", config.precision,
    ]  # fmt: skip


def _copy(recording: RecordConfig, folder: Path) -> Path:
    shutil.copytree(recording.out, folder / "copy")
    return folder / "copy"


def test_states_are_those_of_the_solver(recording: RecordConfig, store: TrajectoryStore) -> None:
    """Every kept position of samples from all shards, in any order, against one run of the solver."""
    model, diffusion = load_teacher(recording.teacher)
    indices = torch.tensor([43, 0, 17, 16, 15])
    times = diffusion.solver_times(25)
    noise = index_noise(indices, (1, 28, 28), recording.seed).half()
    labels = indices % 10
    with torch.no_grad():
        solved = list(diffusion.ddim(guided(model, 10, 1.5), noise.float(), labels, times))
    # Position i holds x_t and the prediction made at times[i]; 25 is the noise, 0 the result (index -1).
    by_position = {state.index: state for state in solved}
    grid = (25, 20, 15, 10, 5, 0)
    for name in ("x0", "xt"):
        states, got_labels = store.states(indices, grid, name)  # type: ignore[arg-type]
        assert torch.equal(got_labels, labels)
        assert states.dtype == torch.float32
        assert torch.equal(states[:, 0], noise.float())
        middle = [by_position[i].x0 if name == "x0" else by_position[i].x for i in grid[1:-1]]
        expected = torch.stack([*middle, by_position[-1].x], 1)  # type: ignore[list-item]
        # Rounded once, to float16. Other batches of the solver move a value in a thousand over a boundary;
        # a solver that starts from noise as it was before rounding moves every other one.
        half = expected.half().float()
        torch.testing.assert_close(states[:, 1:], half, rtol=torch.finfo(torch.float16).eps, atol=1e-5)
        assert (states[:, 1:] == half).double().mean() > 0.99
    x0, _ = store.states(indices, grid, "x0")
    xt, _ = store.states(indices, grid, "xt")
    assert not torch.equal(x0, xt)


def test_classes_are_balanced_and_the_manifest_tells_all(store: TrajectoryStore) -> None:
    _, labels = store.states(torch.arange(40), (25, 0), "x0")
    assert torch.bincount(labels, minlength=10).tolist() == [4] * 10
    assert {"teacher", "solver", "solver_steps", "times", "guidance", "kept", "seed"} <= set(store.manifest)


def test_a_resumed_recording_has_the_same_files(recording: RecordConfig, tmp_path: Path) -> None:
    whole, copy = _files(recording.out), _copy(recording, tmp_path)
    (copy / "shard-000001.safetensors").unlink()
    (copy / "shard-000002.sha256").unlink()  # killed between the shard and its checksum
    (copy / "shard-000000.safetensors").write_bytes(whole["shard-000000.safetensors"][:-7])
    record(replace(recording, out=copy))
    assert _files(copy) == whole


def test_a_killed_recording_goes_on(recording: RecordConfig, tmp_path: Path) -> None:
    """SIGKILL as soon as the first shard is there."""
    out = tmp_path / "killed"
    process = subprocess.Popen(_command(recording, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out / "shard-000000.safetensors").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    record(replace(recording, out=out))
    whole = _files(recording.out)
    assert {name: data for name, data in _files(out).items() if not name.endswith(".tmp")} == whole


def test_two_workers_write_the_same_files(recording: RecordConfig, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    workers = [
        subprocess.Popen(
            _command(recording, out), env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        assert worker.wait(120) == 0, worker.communicate()[1]
    assert _files(out) == _files(recording.out)


def test_batches_and_dtype_are_part_of_the_recording(recording: RecordConfig, tmp_path: Path) -> None:
    """What could change a bit is in the manifest, so a continued recording cannot mix it."""
    copy = _copy(recording, tmp_path)
    before = _files(copy)
    changes = (
        {"samples": 45},
        {"seed": 1},
        {"guidance": 2.0},
        {"batch_size": 16},
        {"keep": "all"},
        {"dtype": "float32"},
    )
    for change in changes:
        with pytest.raises(ValueError, match=r"another recording .*name another folder with --out"):
            record(replace(recording, out=copy, **change))  # type: ignore[arg-type]
    assert _files(copy) == before


@pytest.fixture(scope="module")
def other(recording: RecordConfig, tmp_path_factory: pytest.TempPathFactory) -> RecordConfig:
    config = replace(recording, out=tmp_path_factory.mktemp("other"), seed=1)
    record(config)
    return config


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_repaired(
    recording: RecordConfig, other: RecordConfig, tmp_path: Path, name: str
) -> None:
    copy = _copy(recording, tmp_path)
    message = damage(copy, name, other.out)
    with pytest.raises(ValueError, match="run the same `ard record` again") as caught:
        TrajectoryStore(copy).states(torch.arange(44), (25, 0), "x0")
    assert message in str(caught.value)
    record(replace(recording, out=copy))
    assert _files(copy) == _files(recording.out)


def test_no_store_and_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json there; accepted is a folder written by"):
        TrajectoryStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format is 99, accepted is 1"):
        TrajectoryStore(tmp_path)


@pytest.mark.parametrize("name", ["samples", "shard_size", "kept", "solver_steps", "teacher", "seed"])
def test_a_manifest_that_lacks_something_is_refused(
    recording: RecordConfig, tmp_path: Path, name: str
) -> None:
    copy = _copy(recording, tmp_path)
    manifest = read_json(copy / "manifest.json")
    del manifest[name]
    write_json(copy / "manifest.json", manifest)
    message = rf"manifest\.json: does not describe a folder of `ard record` \(no '{name}'\)"
    with pytest.raises(ValueError, match=message):
        TrajectoryStore(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"samples": "44"}, "samples is '44', accepted is an integer >= 1"),
     ({"shard_size": 0}, "shard_size is 0, accepted is an integer >= 1"),
     ({"kept": 3}, "does not describe a recording"), ({"kept": ["a"]}, r"kept is \['a'\], accepted are pos"),
     ({"solver_steps": 10}, r"kept is \[20, 15, 10, 5\], accepted are positions 1\.\.9")],
)  # fmt: skip
def test_a_manifest_that_says_what_cannot_be_is_refused(
    recording: RecordConfig, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    copy = _copy(recording, tmp_path)
    write_json(copy / "manifest.json", {**read_json(copy / "manifest.json"), **change})
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{message}"):
        TrajectoryStore(copy)


def test_grids_are_those_of_the_release(
    recording: RecordConfig, store: TrajectoryStore, tmp_path: Path
) -> None:
    released = {1: (25, 0), 2: (25, 10, 0), 4: (25, 15, 10, 5, 0), 5: (25, 20, 15, 10, 5, 0)}
    for steps, grid in released.items():
        assert store.grid(steps) == grid
    assert store.grid(3) == (25, 15, 10, 0)  # nearest to 25, 16.7, 8.3, 0
    assert store.grid(2, (25, 20, 0)) == (25, 20, 0)
    refused = {
        (2, (25, 12, 0)): r"positions \[12\] were not kept",
        (2, (25, 0)): r"accepted are 3 \(steps \+ 1\) descending positions from 25 to 0",
        (3, (25, 5, 10, 0)): "descending",
        (2, (20, 10, 0)): "from 25",
        (8, None): r"grid: steps is 8, accepted are 1\.\.5, between the positions that .* has: \[25, 20,",
    }
    for (steps, asked), message in refused.items():
        with pytest.raises(ValueError, match=message):
            store.grid(steps, asked)

    everything = replace(recording, out=tmp_path, samples=10, keep="all")
    record(everything)
    assert TrajectoryStore(tmp_path).grid(8) == (25, 22, 19, 16, 13, 9, 6, 3, 0)


@pytest.mark.parametrize(
    ("keep", "positions"),
    [("all", list(range(24, 0, -1))), ((3, 12), [12, 3]), ((), []), ("fifth", [20, 15, 10, 5])]
)  # fmt: skip
def test_kept_positions(
    recording: RecordConfig, store: TrajectoryStore, tmp_path: Path, keep: object, positions: list[int]
) -> None:
    record(replace(recording, out=tmp_path, samples=16, keep=keep))  # type: ignore[arg-type]
    kept = TrajectoryStore(tmp_path)
    assert kept.manifest["kept"] == positions
    assert load_file(tmp_path / "shard-000000.safetensors")["xt"].shape[1] == len(positions)
    grid = (25, *positions, 0)
    states, _ = kept.states(torch.arange(16), grid, "x0")
    shared = [i for i in grid if i in (25, 20, 15, 10, 5, 0)]
    wanted, _ = store.states(torch.arange(16), tuple(shared), "x0")
    assert torch.equal(states[:, [grid.index(i) for i in shared]], wanted)


def test_positions_that_the_solver_has_not_are_refused(recording: RecordConfig, tmp_path: Path) -> None:
    for keep in ((25,), (0,)):
        with pytest.raises(ValueError, match=r"keep is \(\d+,\), accepted are positions 1\.\.24"):
            record(replace(recording, out=tmp_path / "refused", keep=keep))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("solver", ["heun", "dpm-solver++"])
def test_every_solver_is_recorded_alike(recording: RecordConfig, tmp_path: Path, solver: Solver) -> None:
    """Position i holds what that solver has at times[i]; another solver's store is not continued."""
    config = replace(
        recording, out=tmp_path, samples=8, solver=solver, solver_steps=10, dtype="float32", keep="all"
    )
    record(config)
    store = TrajectoryStore(tmp_path)
    assert store.summary(store.grid(4), "x0")["solver"] == solver
    model, diffusion = load_teacher(config.teacher)
    noise, labels = index_noise(torch.arange(8), (1, 28, 28), 0), torch.arange(8)
    with torch.no_grad():
        denoise, times = guided(model, 10, 1.5), diffusion.solver_times(10)
        solved = {state.index: state for state in diffusion.solve(denoise, noise, labels, times, solver)}
    grid = tuple(range(10, -1, -1))
    for name in ("x0", "xt"):
        states, _ = store.states(torch.arange(8), grid, name)  # type: ignore[arg-type]
        middle = [solved[i].x0 if name == "x0" else solved[i].x for i in grid[1:-1]]
        assert torch.equal(states, torch.stack([noise, *middle, solved[-1].x], 1))  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"another recording .*solver is"):
        record(replace(config, solver="ddim"))
    with pytest.raises(ValueError, match="record: solver is 'euler', accepted are 'ddim', 'heun'"):
        record(replace(config, out=tmp_path / "refused", solver="euler"))  # type: ignore[arg-type]
    assert not (tmp_path / "refused").exists()


def _live(config: RecordConfig, samples: int | None) -> LiveTrajectories:
    options = {field.name: getattr(config, field.name) for field in fields(SolverConfig)}
    return LiveTrajectories(config.teacher, SolverConfig(**options), samples)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16", "solver": "heun", "solver_steps": 11},
        {"precision": "bf16", "seed": 3, "guidance": 1},
    ],
    ids=str,
)  # fmt: skip
def test_live_is_what_would_be_recorded(
    recording: RecordConfig, tmp_path: Path, options: dict[str, object]
) -> None:
    """To the bit, where the passes of the solver are the same: samples 0..7, 8..15, and the last shard's."""
    config = replace(recording, out=tmp_path, keep="all", samples=20, **options)  # type: ignore[arg-type]
    record(config)
    store, live = TrajectoryStore(tmp_path), _live(config, 20)
    top = config.solver_steps
    for indices in (torch.arange(16), torch.arange(16, 20)):
        for name, grid in (("x0", tuple(range(top, -1, -1))), ("xt", (top, 7, 2, 0)), ("x0", (top, 0))):
            ours, wanted = (of.states(indices, grid, name) for of in (live, store))  # type: ignore[arg-type]
            for got, expected in zip(ours, wanted, strict=True):
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected)
    assert live.summary((top, 0), "x0") == store.summary((top, 0), "x0")
    assert len(live) == len(store)
    for steps in (1, 2, 3, 4, 5):
        assert live.grid(steps) == store.grid(steps)


def test_a_live_sample_depends_on_seed_and_index_alone(recording: RecordConfig) -> None:
    """Any batch, any order, an endless supply: its noise and class to the bit, the rest up to rounding."""
    live, grid = _live(recording, None), (25, 15, 10, 5, 0)
    state = torch.random.get_rng_state()
    indices = torch.tensor([10**12, 43, 7, 0, 10**12, 16, 15, 2, 9, 3])  # two passes, of 8 and 2
    path, labels = live.states(indices, grid, "x0")
    alone = [live.states(index.view(1), grid, "x0") for index in indices]
    assert torch.equal(path[:, 0], index_noise(indices, (1, 28, 28), recording.seed).half().float())
    assert labels.tolist() == [index % 10 for index in indices.tolist()]
    torch.testing.assert_close(path, torch.cat([p for p, _ in alone]), rtol=1e-3, atol=1e-5)  # float16
    assert len(live) >= 10**12
    assert not path.requires_grad
    assert torch.equal(torch.random.get_rng_state(), state)


def test_live_passes_hold_batch_size_samples(
    recording: RecordConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, seen, forward = _live(recording, None), set(), DiT.forward

    def counted(self: DiT, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.add(len(x))
        return forward(self, x, t, labels)

    monkeypatch.setattr(DiT, "forward", counted)
    path, _ = live.states(torch.arange(20), (25, 0), "x0")
    assert len(path) == 20
    assert seen == {2 * 8, 2 * 4}  # with and without class


def test_precision_is_that_of_the_teacher_alone(recording: RecordConfig) -> None:
    """bfloat16 products show in the result, at their size; the noise has no such rounding."""
    exact, rounded = (
        LiveTrajectories(recording.teacher, SolverConfig(dtype="float32", precision=precision), 4)
        for precision in ("no", "bf16")
    )
    (full, _), (half, _) = (live.states(torch.arange(4), (25, 10, 0), "x0") for live in (exact, rounded))
    assert torch.equal(full[:, 0], half[:, 0])
    error = (full - half)[:, 1:].abs().mean() / full[:, 1:].abs().mean()
    assert 1e-5 < error < 0.1


def test_live_refuses_what_cannot_be(recording: RecordConfig, tmp_path: Path) -> None:
    live = _live(recording, None)
    live.check_teacher(recording.teacher)
    save_teacher(tmp_path, tiny_teacher(seed=1), Diffusion("linear", "v"))
    with pytest.raises(ValueError, match="was recorded from another teacher than"):
        live.check_teacher(tmp_path)
    with pytest.raises(ValueError, match="samples is 0, accepted is an integer >= 1"):
        _live(recording, 0)
    for options, message in (
        ({"batch_size": 0}, "LiveTrajectories: batch_size is 0, accepted is an integer >= 1"),
        ({"solver": "rk4"}, "LiveTrajectories: solver is 'rk4', accepted are 'ddim'"),
        ({"solver_steps": 0}, r"solver steps is 0, accepted are 1\.\.1000"),
    ):
        with pytest.raises(ValueError, match=message):
            LiveTrajectories(recording.teacher, SolverConfig(**options))  # type: ignore[arg-type]


def test_samples_and_states_that_are_not_there_are_named(store: TrajectoryStore) -> None:
    for index in (-1, 44):
        with pytest.raises(ValueError, match=rf"indices are .*{index}.*, accepted are .* 0\.\.43"):
            store.states(torch.tensor([0, index]), (25, 0), "x0")
    with pytest.raises(ValueError, match=r"indices are \[\], accepted are one or more of 0"):
        store.states(torch.tensor([]), (25, 0), "x0")
    with pytest.raises(ValueError, match="state is 'eps', accepted are 'x0', 'xt'"):
        store.states(torch.tensor([0]), (25, 0), "eps")  # type: ignore[arg-type]
    for grid in ((25, 3, 0), (24, 10, 0), (25, 10, 5)):
        with pytest.raises(ValueError, match=r"^grid"):
            store.states(torch.tensor([0]), grid, "x0")
        with pytest.raises(ValueError, match=r"^grid"):
            store.summary(grid, "x0")
    with pytest.raises(ValueError, match="summary: state is 'bogus', accepted are 'x0', 'xt'"):
        store.summary((25, 0), "bogus")  # type: ignore[arg-type]
    assert TrajectoryStore(str(store.folder)).manifest == store.manifest


def test_the_states_of_a_number_of_steps_are_kept(
    teacher: Path, recording: RecordConfig, tmp_path: Path
) -> None:
    """Those that would be chosen among all, beside the others; a store that goes on keeps its own."""
    every = replace(recording, out=tmp_path / "every", samples=64, keep="all")
    record(every)
    grid, _ = chosen_grid(load_teacher(teacher)[0], TrajectoryStore(every.out), 3)
    some = replace(recording, out=tmp_path / "some", samples=64, steps=3)
    record(some)
    kept = TrajectoryStore(some.out).manifest["kept"]
    assert set(kept) == {20, 15, 10, 5} | set(grid[1:-1])
    assert chosen_grid(load_teacher(teacher)[0], TrajectoryStore(some.out), 3)[0] == grid
    (some.out / "shard-000002.safetensors").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ard.recording.chosen_grid", lambda *given, **more: pytest.fail("chosen again"))
        record(some)
    assert TrajectoryStore(some.out).manifest["kept"] == kept
    with pytest.raises(ValueError, match="steps"):
        record(replace(some, steps=4))
    with pytest.raises(ValueError, match="steps is 30"):
        record(replace(some, out=tmp_path / "none", steps=30))
