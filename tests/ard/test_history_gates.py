"""History that starts closed: learned weights of earlier blocks' keys."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import randomise, tiny_teacher
from torch import Tensor

import ard
from ard.models import ARDTransformer
from ard.models.history import HistoryGates, KVCache, TeacherForced, gate_columns
from ard_kernels import BlockLayout
from ard_kernels.layout import Mask

_MASKS: tuple[Mask, ...] = ("causal", "window", "anchor", "diagonal")


def _definition(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, mask: Mask, bias: Tensor) -> Tensor:
    """Dense attention, its scores with log(gate) added, in float64. bias (S, H, S-1)."""
    block = layout.block_ids()
    padded = torch.nn.functional.pad(bias.double(), (0, 1))[block][:, :, block]  # (T, H, T)
    scores = torch.einsum("bihd,bjhd->bihj", q.double(), k.double()) / math.sqrt(q.shape[-1]) + padded
    weights = scores.masked_fill(~layout.mask(mask).unsqueeze(1), -math.inf).softmax(-1)
    return torch.einsum("bihj,bjhd->bihd", weights, v.double())


def _gates(layers: int, heads: int, steps: int, seed: int = 0) -> HistoryGates:
    gates = HistoryGates(layers, heads, steps).double()
    with torch.no_grad():
        gates.gates.copy_(torch.rand(gates.gates.shape, generator=torch.Generator().manual_seed(seed)) * 1.5)
    return gates


@pytest.mark.parametrize("mask", _MASKS)
@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (3, 1, 7), (4, 9)])
@pytest.mark.parametrize("head_dim", [16, 24, 72])
def test_attention_has_the_bias(mask: Mask, lengths: tuple[int, ...], head_dim: int) -> None:
    layout = BlockLayout(lengths)
    q, k, v = torch.randn(3, 2, layout.total, 3, head_dim, generator=torch.Generator().manual_seed(1))
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    gates = _gates(2, 3, layout.blocks)
    inputs = (q, k, v, gates.gates)
    grad = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    expected = _definition(q, k, v, layout, mask, gates()[1])
    wanted = torch.autograd.grad(expected, inputs, grad, allow_unused=True)
    out = TeacherForced(layout, 2, mask, gates.columns(layout, head_dim)).attend(1, q, k, v)
    # Gates become float32 on their way, as scores are in the kernels.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(out, inputs, grad)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_pairs_are_in_order() -> None:
    gates = HistoryGates(1, 1, 4)
    with torch.no_grad():
        gates.gates.copy_(torch.arange(1.0, 7.0).exp().view(1, 1, 6))
    expected = torch.tensor([[0, 0, 0], [1, 0, 0], [2, 3, 0], [4, 5, 6]]).float()
    torch.testing.assert_close(gates()[0, :, 0], expected)


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 10])
def test_the_widened_head_dim_is_one_that_kernels_take(steps: int) -> None:
    for head_dim in (16, 32, 64, 72, 88):
        columns = gate_columns(head_dim, steps)
        assert columns >= steps - 1
        assert (head_dim + columns) % 8 == 0
        assert columns - (steps - 1) < 8


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("mask", ["causal", "window", "anchor"])
def test_it_starts_as_without_history(history: int, mask: Mask) -> None:
    teacher = tiny_teacher().double()
    alone = ARDTransformer.from_teacher(teacher, 4, 0)
    student = ARDTransformer.from_teacher(teacher, 4, history, mask, gated_history=True)
    opened = ARDTransformer.from_teacher(teacher, 4, history, mask)
    states, labels = torch.randn(2, 4, 1, 28, 28, dtype=torch.float64), torch.tensor([3, 7])
    expected = alone(states, labels)
    torch.testing.assert_close(student(states, labels), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(opened(states, labels), expected, rtol=1e-3, atol=1e-3)
    assert student.history_gates is not None
    with torch.no_grad():
        student.history_gates.gates.fill_(1)
    torch.testing.assert_close(student(states, labels), opened(states, labels), rtol=1e-9, atol=1e-9)


def test_a_closed_gate_has_the_gradient_by_which_it_would_open() -> None:
    """The derivative at 0 and below is that from above, by finite differences."""
    layout = BlockLayout.uniform(3, 4)
    q, k, v = torch.randn(3, 2, 12, 2, 16, generator=torch.Generator().manual_seed(1)).double()
    grad = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gates = HistoryGates(1, 2, 3).double()

    def value(opened: float) -> float:
        weights = gates.gates.detach().clone()
        weights[0, 1, 2] = opened
        with torch.no_grad():
            bias = torch.nn.functional.pad(weights.clamp(min=1e-12).log(), (0, 0))
            table = torch.zeros(3, 2, 2, dtype=torch.float64)
            rows, columns = torch.tril_indices(3, 2, -1)
            table[rows, :, columns] = bias[0].T
            return float((_definition(q, k, v, layout, "causal", table) * grad).sum())

    for start in (0.0, -0.3):
        with torch.no_grad():
            gates.gates.fill_(start)
        out = TeacherForced(layout, 1, "causal", gates.columns(layout, 16)).attend(0, q, k, v)
        (found,) = torch.autograd.grad((out * grad).sum(), gates.gates)
        slope = (value(1e-5) - value(0.0)) / 1e-5
        assert float(found[0, 1, 2]) == pytest.approx(slope, rel=1e-3)
        assert abs(slope) > 1e-3


@pytest.mark.parametrize("mask", ["causal", "window", "anchor"])
def test_cached_steps_are_the_training_pass(mask: Mask) -> None:
    teacher = tiny_teacher().double()
    student = ARDTransformer.from_teacher(teacher, 4, 2, mask, gated_history=True)
    randomise(student, 5)
    noise, labels = torch.randn(3, 1, 28, 28, dtype=torch.float64), torch.tensor([3, 7, 0])
    path = ard.sample(student, noise, labels)
    forced = student(torch.cat([noise.unsqueeze(1), path[:, :-1]], 1), labels)
    torch.testing.assert_close(forced, path, rtol=1e-9, atol=1e-9)


def test_the_cache_keeps_what_was_written() -> None:
    """Every batch of a cache has its columns, also after many steps with other keys."""
    layout, gates = BlockLayout((2, 3, 4)), _gates(1, 2, 3)
    q, k, v = torch.randn(3, 2, 9, 2, 16, generator=torch.Generator().manual_seed(1)).double()
    expected = _definition(q, k, v, layout, "causal", gates()[0])
    cache = KVCache(layout, 1, "causal", 2, 2, 16, torch.float64, q.device, gates.columns(layout, 16))
    for _ in range(2):
        for block in range(3):
            cache.start(block)
            rows = layout.slice(block)
            out = cache.attend(0, q[:, rows], k[:, rows], v[:, rows])
            torch.testing.assert_close(out, expected[:, rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("steps", "history"), [(1, 2), (4, 0)])
def test_without_pairs_there_are_no_gates(steps: int, history: int) -> None:
    student = ARDTransformer.from_teacher(tiny_teacher(), steps, history, gated_history=True)
    assert student.history_gates is None
    assert student.config["gated_history"]


def test_gates_open_in_training() -> None:
    """From 0 and below they find the weights that another's output was made with."""
    layout = BlockLayout.uniform(3, 8)
    q, k, v = torch.randn(3, 16, 24, 2, 16, generator=torch.Generator().manual_seed(1))
    wanted, gates = _gates(1, 2, 3).float(), HistoryGates(1, 2, 3)
    with torch.no_grad():
        gates.gates[..., 1] = -0.2
        expected = TeacherForced(layout, 1, "causal", wanted.columns(layout, 16)).attend(0, q, k, v)
    optimiser = torch.optim.Adam(gates.parameters(), lr=0.03)
    for _ in range(400):
        optimiser.zero_grad()
        (
            TeacherForced(layout, 1, "causal", gates.columns(layout, 16)).attend(0, q, k, v) - expected
        ).square().mean().backward()
        optimiser.step()
        gates.constrain()
        assert gates.gates.min() >= 0
    torch.testing.assert_close(gates.gates, wanted.gates, rtol=0, atol=0.05)


def test_columns_are_made_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in every layer, nor in every step of sampling."""
    student = ARDTransformer.from_teacher(tiny_teacher(), 4, 2, gated_history=True)
    made, columns = [], HistoryGates.columns
    monkeypatch.setattr(HistoryGates, "columns", lambda *given: made.append(1) or columns(*given))
    student(torch.randn(2, 4, 1, 28, 28), torch.tensor([1, 2]))
    assert len(made) == 1
    ard.sample(student, torch.randn(2, 1, 28, 28), torch.tensor([1, 2]))
    assert len(made) == 2
