"""The cost formulas are exact, and are the published ones."""

from __future__ import annotations

import contextlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ard.costs import (
    PUBLISHED,
    FlopsConfig,
    Row,
    count_dit,
    count_sampling,
    count_training_pass,
    dit_macs,
    run,
    student_macs,
)
from ard.models import ARDTransformer, DiT
from ard.sampling import sample
from ard_kernels.layout import MASKS, Mask

_ODD = {
    "input_size": (16, 24),
    "patch_size": 4,
    "channels": 3,
    "width": 48,
    "depth": 3,
    "heads": 3,
    "mlp_ratio": 2.5,
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the command prints and what it writes."""
    folder = tmp_path_factory.mktemp("costs")
    with (folder / "printed").open("w") as printed, contextlib.redirect_stdout(printed):
        run(FlopsConfig(out=folder / "new" / "flops.json"))
    return folder


@pytest.fixture
def table(output: Path) -> list[Row]:
    written = json.loads((output / "new" / "flops.json").read_text())
    return [Row(**row) for row in written["published_table"]]


def _meta_dit(**options: object) -> DiT:
    with torch.device("meta"):
        return DiT(**{**_ODD, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_teacher_formula_is_the_count(batch: int, learn_sigma: bool) -> None:
    dit = _meta_dit(learn_sigma=learn_sigma)
    assert dit_macs(dit.config, batch).total == count_dit(dit, batch)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("steps", "layers"), [(1, 0), (2, 1), (3, 3), (5, 2)])
def test_student_formula_is_both_counts(mask: Mask, steps: int, layers: int) -> None:
    for shared, gated in ((False, False), (True, False), (False, True)):
        student = ARDTransformer.from_teacher(
            _meta_dit(), steps, layers, mask, not shared, gated_history=gated
        )
        for batch in (1, 3):
            total = student_macs(student.config, batch).total
            assert total == count_training_pass(student, batch) == count_sampling(student, batch)


def test_only_the_time_embedding_is_shared_by_a_batch() -> None:
    student = ARDTransformer.from_teacher(_meta_dit(), 3, 2)
    one, many = student_macs(student.config, 1), student_macs(student.config, 7)
    assert many.time == one.time == 3 * (256 + 48) * 48
    assert many.total - many.time == 7 * (one.total - one.time)


def test_published_costs(table: list[Row]) -> None:
    assert [row.published for row in table] == [
        59300, 5930, 118.6, 237.2, 238.1, 241.5, 474.4, 477.1, 477.1, 479.9, 500.2,
    ]  # fmt: skip
    for row in table:
        assert row.formula == row.counted
        assert row.formula == pytest.approx(row.published, rel=5e-3)


def test_overhead_of_history(table: list[Row]) -> None:
    """The paper's 1.1 %: six extra block pairs in six layers, 6 * 6 * 2 * 256^2 * 1152, over N = 0."""
    (row,) = (r for r in table if (r.steps, r.history_layers, r.mask) == (4, 6, "causal"))
    (without,) = (r for r in table if (r.steps, r.history_layers) == (4, 0))
    assert row.overhead_percent == pytest.approx(
        100 * 6 * 6 * 2 * 256**2 * 1152 / (without.formula * 1e9), rel=1e-12
    )
    assert row.overhead_percent == pytest.approx(1.145, abs=1e-3)
    assert all(r.overhead_percent == 0 for r in table if r.history_layers == 0)


def test_more_history_costs_more() -> None:
    dit = _meta_dit()
    costs = [student_macs(ARDTransformer.from_teacher(dit, 4, n).config).total for n in range(4)]
    assert all(a < b for a, b in pairwise(costs))


def test_command_prints_and_writes(output: Path) -> None:
    printed = (output / "printed").read_text()
    assert all(f"{row.gmacs:.1f}" in printed for row in PUBLISHED)
    written = json.loads((output / "new" / "flops.json").read_text())
    assert len(written["published_table"]) == len(PUBLISHED)
    assert written["model"]["macs"]["total"] == written["model"]["counted"]["sampling"]
    assert [p.name for p in (output / "new").iterdir()] == ["flops.json"]


def test_command_for_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    run(FlopsConfig(model="DiT-S/8", steps=2, history_layers=3))
    printed = capsys.readouterr().out
    assert "DiT-S/8" in printed
    assert "59300" not in printed


def test_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="model is 'DiT-M/2'"):
        run(FlopsConfig(model="DiT-M/2"))


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_sampling_is_counted_without_values(fake: bool) -> None:
    """The public `sample` on tensors that have none: shapes, and the formula's count (which counts one time
    embedding per call)."""
    config = {"steps": 3, "history_layers": 2}
    if fake:  # made outside: PyTorch cannot copy modules of fake tensors
        student = ARDTransformer.from_teacher(DiT(**_ODD), **config)  # type: ignore[arg-type]
        with FakeTensorMode(allow_non_fake_inputs=True):
            noise, labels = torch.empty(2, 3, 16, 24), torch.empty(2, dtype=torch.int64)
            path = sample(student, noise, labels)
        assert isinstance(path, FakeTensor)
    else:
        student = ARDTransformer.from_teacher(_meta_dit(), **config)  # type: ignore[arg-type]
        noise = torch.empty(2, 3, 16, 24, device="meta")
        with FlopCounterMode(display=False) as counter:
            path = sample(student, noise, torch.empty(2, dtype=torch.int64, device="meta"))
        assert path.is_meta
        assert counter.get_total_flops() == 2 * student_macs(student.config, 2).total
    assert path.shape == (2, 3, 3, 16, 24)


def test_sampling_is_counted_with_values() -> None:
    student = ARDTransformer.from_teacher(DiT(**_ODD), 3, 2)  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter:
        sample(student, torch.randn(2, 3, 16, 24), torch.tensor([0, 999]))
    assert counter.get_total_flops() == 2 * student_macs(student.config, 2).total
