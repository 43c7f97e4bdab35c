"""The table of measured launches: what is chosen, kept, read and refused."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ard_kernels import BlockLayout, tune
from ard_kernels.__main__ import main
from ard_kernels.backends import attention_triton
from ard_kernels.tune import Launch, candidates, fastest, key, tuned, write


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ARD_KERNELS_LAUNCHES", str(tmp_path / "deep" / "launches.json"))
    tune._table.cache_clear()
    yield tmp_path / "deep" / "launches.json"
    tune._table.cache_clear()


_LAUNCHES = candidates("forward", 72, True, 9)


def test_the_built_in_launch_is_among_those_that_are_measured() -> None:
    """The table replaces it: it must not be by a slower one."""
    for kernel, dim, whole, major in itertools.product(
        tune.KERNELS, (64, 72, 128), (True, False), (8, 9, 10)
    ):
        found = candidates(kernel, dim, whole, major)
        assert found[0] == attention_triton.launch(kernel, dim, False, whole, major)
        assert len(set(found)) == len(found) > 20


def _dying(name: str, *_: object) -> bool:
    if name == "dies":
        os.abort()
    if name == "raises":
        raise RuntimeError
    return name == "trap"


def test_a_compiler_that_ends_its_process_costs_its_own_launch_alone() -> None:
    names = ["a", "dies", "b", "trap", "raises", "c"]
    jobs = [(name, "dq", _LAUNCHES[0], 72, 128, 2) for name in names]
    found = {job[0]: stop for job, stop in tune.compile_all(jobs, 2, _dying)}
    assert found == {"a": False, "b": False, "c": False, "dies": True, "raises": True, "trap": True}


def test_the_fastest_that_runs_is_chosen(path: Path) -> None:
    """Every candidate is in force while it is timed; those that fail are passed over and named."""
    times = {at: 10.0 - i for i, at in enumerate(_LAUNCHES)}
    last = _LAUNCHES[-1]
    seen, said = [], []

    def time() -> float:
        at = tuned("GPU", "forward 72")
        assert at is not None
        seen.append(at)
        if at == last:
            raise RuntimeError("out of resource: shared memory")
        return times[at]

    trap = _LAUNCHES[0]
    best = fastest("forward 72", _LAUNCHES, time, said.append, {trap})
    assert [trap, *seen] == [*_LAUNCHES]
    assert said[0].endswith("no code that may run")
    assert best == (seen[-2], times[seen[-2]])
    assert "out of resource" in said[-1]
    assert tuned("GPU", "forward 72") is None


def test_a_launch_with_wrong_results_is_passed_over(path: Path) -> None:
    """However fast it is."""
    at = _LAUNCHES
    exact = (torch.ones(3), torch.full((3,), 2.0))

    def run() -> tuple[torch.Tensor, ...]:
        error = {at[0]: 0.01, at[1]: 0.03, at[2]: float("nan")}.get(tuned("GPU", "dq 72") or at[3], 1.0)
        return exact[0], exact[1] * (1 + error)

    said: list[str] = []
    call = tune._Call(run, lambda: exact, ("dk", "dv"))
    best = fastest("dq 72", at, lambda: call.time(lambda _: 5.0), said.append)
    assert best == (at[0], 5.0)
    assert said[1].endswith("ArithmeticError: dv is wrong: relative error 3.0e-02")
    assert said[2].endswith("dv is wrong: relative error nan")


@pytest.mark.usefixtures("triton")
def test_every_kernel_that_is_tuned_is_held_to_the_same_in_float32() -> None:
    calls = tune._calls(16, BlockLayout.uniform(2, 16), 1, 1, torch.get_default_device().type)
    assert tuple(calls) == tune.KERNELS
    for call in calls.values():
        assert call.time(lambda run: float(len(run()))) == len(call.results)
        wrong = tune._Call(call.run, lambda call=call: tuple(2 * x for x in call.exact()), call.results)
        with pytest.raises(ArithmeticError, match=f"{call.results[0]} is wrong: relative error 5.0e-01"):
            wrong.time(lambda run: 0.0)


@pytest.mark.gpu
def test_tuning_writes_what_later_calls_take(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "candidates", lambda *_: (Launch(64, 64, 4, 2), Launch(128, 64, 8, 2)))
    found = tune.tune([64], 128, 32, heads=2)
    assert {"forward 64", "dq 64", "dkv 64"} <= set(found) <= {f"{kernel} 64" for kernel in tune.KERNELS}
    tune._table.cache_clear()
    assert {name: tuned(torch.cuda.get_device_name(), name) for name in found} == found


def test_the_table_is_kept_per_gpu(path: Path) -> None:
    write("A", {key("dq", 72, True): Launch(128, 64, 8, 2)})
    write("B", {key("dq", 72, True): Launch(64, 64, 4, 3)})
    write("A", {key("dkv", 72, False): Launch(128, 32, 8, 2)})
    assert tuned("A", "dq 72") == Launch(128, 64, 8, 2)
    assert tuned("A", "dkv 72 ragged") == Launch(128, 32, 8, 2)
    assert tuned("B", "dq 72") == Launch(64, 64, 4, 3)
    assert tuned("B", "dkv 72 ragged") is None
    write("A", {key("dq", 72, True): None})
    assert tuned("A", "dq 72") is None
    assert tuned("A", "dkv 72 ragged") == Launch(128, 32, 8, 2)
    assert list(path.parent.iterdir()) == [path]


def test_a_home_that_cannot_be_read_has_no_table(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """As in a container of another user. A table that was asked for is another matter."""
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"ARD_KERNELS_LAUNCHES: .*{path.name}"):
        tuned("GPU", "forward 72")
    monkeypatch.delenv("ARD_KERNELS_LAUNCHES")
    monkeypatch.setattr(Path, "home", lambda: path.parent)
    (path.parent / ".cache").touch()
    with pytest.warns(UserWarning, match=r"table of launches cannot be read, .*Not a directory"):
        assert tuned("GPU", "forward 72") is None


@pytest.mark.parametrize(
    "stored",
    ["{", "[]", '{"A": {"dq 72": {"rows": 1}}}', '{"A": {"dq 72": 3}}', json.dumps(
        {"A": {"dq 72": {"rows": 128, "step": 64, "warps": 8, "stages": 0}}}
    )],
)  # fmt: skip
def test_a_file_that_is_no_table_is_named(path: Path, stored: str) -> None:
    path.parent.mkdir()
    path.write_text(stored)
    with pytest.raises(ValueError, match=r"launches\.json"):
        tuned("A", "dq 72")


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "tune: no CUDA device\n"
