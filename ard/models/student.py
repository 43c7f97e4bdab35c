"""The ARD student: a teacher's layers over the states of a trajectory, one block of tokens a state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ard.models.dit import (
    DiT,
    FinalLayer,
    LabelEmbedder,
    check_inputs,
    check_labels,
    is_integer,
    run_layers,
    unpatchify,
)
from ard.models.history import GateColumns, HistoryGates, KVCache, TeacherForced
from ard.models.pretrained import Pretrained
from ard_kernels import BlockLayout
from ard_kernels.backends import autocast_dtype
from ard_kernels.layout import Mask, check_mask


def student_times(steps: int) -> Tensor:
    """(S,): the time that each input state is conditioned on, 999 (S-s)/S as in the released recipe."""
    return 999.0 * (steps - torch.arange(steps, dtype=torch.float32)) / steps


class ARDTransformer(nn.Module, Pretrained):
    """G(x_0 .. x_s; c) -> x_{s+1} for all steps s (arXiv 2504.11295, equation 5 and figure 4).

    Args:
        teacher: the configuration of the DiT it is made from (`DiT.config`).
        teacher_class: that DiT's class, by name (`DiT.classes`).
        steps: S, the number of states it sees and of predictions it makes.
        history_layers: N, how many of the lowest layers see earlier states; 0 is step distillation.
        mask: which earlier states they see.
        per_step_final: one final layer per step, or one shared by all.
        times: S times that the input states are conditioned on, on the teacher's scale and in its direction
            (`Diffusion.student_times`); default: those of the released recipe, for times in 0..999. Of a
            teacher that knows its process `from_teacher` takes that one's.
        transitions: None: a head's output is the next state (the published student). S pairs (a, b): it is
            what the teacher predicts at the state, and a state + b output is the next one, by the teacher's
            first-order solver (`Diffusion.transition`), as which the student starts.
        gated_history: whether keys of earlier blocks have learned weights that start at 0 (`HistoryGates`),
            so that the student starts as one without history.

    Raises:
        ValueError: an argument that is none of these; the message names it.

    Attributes:
        checkpointing: trade compute for memory in training (activation checkpointing).
        trajectories: what it was trained on, as its folder records it.
    """

    times: Tensor

    def __init__(
        self, teacher: dict[str, Any], steps: int = 4, history_layers: int = 6, mask: Mask = "causal",
        per_step_final: bool = True, times: Sequence[float] | None = None, teacher_class: str = "DiT",
        transitions: Sequence[Sequence[float]] | None = None, gated_history: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if teacher_class not in DiT.classes:
            raise ValueError(f"ARDTransformer: teacher_class is {teacher_class!r}, known here are "
                             f"{', '.join(DiT.classes)}; import the module that defines it")  # fmt: skip
        dit = DiT.classes[teacher_class](**teacher)
        self._build(dit, steps, history_layers, mask, per_step_final, times, transitions, gated_history)

    def _build(
        self, dit: DiT, steps: int, history_layers: int, mask: Mask, per_step_final: bool,
        times: Sequence[float] | None, transitions: Sequence[Sequence[float]] | None, gated_history: bool,
    ) -> None:  # fmt: skip
        if not is_integer(steps):
            raise ValueError(f"ARDTransformer: steps is {steps!r}, accepted is an integer >= 1")
        if not is_integer(history_layers, 0) or history_layers > dit.depth:
            raise ValueError(f"ARDTransformer: history_layers is {history_layers!r}, accepted are "
                             f"0..{dit.depth} (integers), the teacher's layers")  # fmt: skip
        check_mask(mask, "ARDTransformer")
        for name, flag in {"per_step_final": per_step_final, "gated_history": gated_history}.items():
            if not isinstance(flag, bool):
                raise ValueError(f"ARDTransformer: {name} is {flag!r}, accepted are True and False")
        if times is not None and not _are_times(times, steps):
            raise ValueError(f"ARDTransformer: times is {times!r}, accepted are {steps} (steps) finite "
                             "numbers")  # fmt: skip
        if transitions is not None and not _are_transitions(transitions, steps):
            raise ValueError(f"ARDTransformer: transitions is {transitions!r}, accepted are {steps} (steps) "
                             "pairs of finite numbers")  # fmt: skip
        self.config: dict[str, Any] = {
            "teacher": dit.config, "steps": steps, "history_layers": history_layers, "mask": mask,
            "per_step_final": per_step_final,
        }  # fmt: skip
        if times is not None:
            self.config["times"] = [float(t) for t in times]
        self.transitions = None if transitions is None else [(float(a), float(b)) for a, b in transitions]
        if self.transitions is not None:
            self.config["transitions"] = [[*pair] for pair in self.transitions]
        if gated_history:
            self.config["gated_history"] = True
        if type(dit) is not DiT:
            self.config["teacher_class"] = type(dit).__name__
        self.steps, self.history_layers, self.mask = steps, history_layers, mask
        self.grid, self.patch_size, self.channels = dit.grid, dit.patch_size, dit.channels
        self.input_size, self.heads, self.width, self.depth = dit.input_size, dit.heads, dit.width, dit.depth
        self.num_classes = dit.num_classes
        self.layout = BlockLayout.uniform(steps, dit.tokens)
        self.checkpointing = False
        self.trajectories: dict[str, Any] = {}

        self.x_embedder, self.t_embedder, self.y_embedder = dit.x_embedder, dit.t_embedder, dit.y_embedder
        self.pos_embed = dit.pos_embed
        self.blocks = dit.blocks
        final = _without_variance(dit)
        self.final_layers = nn.ModuleList(copy.deepcopy(final) for _ in range(steps if per_step_final else 1))
        gated = gated_history and history_layers > 0 and steps > 1
        self.history_gates = None
        if gated:
            self.history_gates = HistoryGates(history_layers, dit.heads, steps).to(dit.pos_embed)
        told = student_times(steps) if times is None else torch.tensor(times, dtype=torch.float32)
        self.register_buffer("times", told.to(dit.pos_embed.device), persistent=False)

    @classmethod
    def from_teacher(
        cls,
        teacher: DiT,
        steps: int = 4,
        history_layers: int = 6,
        mask: Mask = "causal",
        per_step_final: bool = True,
        times: Sequence[float] | None = None,
        levels: Sequence[int] | None = None,
        gated_history: bool = False,
    ) -> ARDTransformer:
        """A student with a copy of the teacher's weights, in every final layer without the variance half.

        Args:
            teacher: a DiT, which stays as it is.
            steps, history_layers, mask, per_step_final, times, gated_history: as for the class.
            levels: for a student whose heads' output is the teacher's prediction: the teacher's times,
                descending, at which its S input states (xt) stand. It is told those, and starts as the
                teacher's first-order solver over them, by the teacher's `diffusion`.

        Returns:
            The student, on the teacher's device and in its dtype; all weights but the positions train.

        Raises:
            ValueError: an argument that is none of these; the message names it.
        """
        if not isinstance(teacher, DiT):
            raise ValueError(
                f"ARDTransformer.from_teacher: teacher is {type(teacher).__name__}, accepted is a DiT"
            )
        transitions = None
        if levels is not None:
            if teacher.diffusion is None or times is not None:
                given = "times is given, too" if times is not None else "the teacher's diffusion is not known"
                raise ValueError(f"ARDTransformer.from_teacher: levels is {levels!r}, but {given}")
            if not is_integer(steps) or len(levels) != steps:
                raise ValueError(
                    f"ARDTransformer.from_teacher: levels is {levels!r}, accepted are {steps} (steps)"
                )
            times, transitions = teacher.diffusion.student_steps(levels)
        elif times is None and teacher.diffusion is not None and is_integer(steps):
            told = teacher.diffusion.student_times(steps)
            times = None if told == student_times(steps).tolist() else told
        student = cls.__new__(cls)
        nn.Module.__init__(student)
        student._build(
            copy.deepcopy(teacher), steps, history_layers, mask, per_step_final, times, transitions,
            gated_history,
        )  # fmt: skip
        return student.requires_grad_(True)._freeze_positions()

    def _freeze_positions(self) -> ARDTransformer:
        self.pos_embed.requires_grad_(False)
        return self

    @classmethod
    def _load_folder(cls, folder: Path) -> ARDTransformer:
        from ard.checkpoints import load_student  # which imports this module

        return load_student(folder)[0]

    def _save_folder(self, folder: Path) -> None:
        from ard.checkpoints import write_student

        write_student(folder, self, self.trajectories)

    @property
    def head(self) -> str:
        """ "solver" where the output is what the teacher predicts, "direct" where it is the next state."""
        return "direct" if self.transitions is None else "solver"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ARDTransformer:
        times = self.times  # stay float32 whatever the weights become: bfloat16 has no 749.25, nor 999
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.times.dtype != times.dtype:
            self.times = times.to(self.times.device)
        return self

    def _final(self, step: int) -> FinalLayer:
        layer = self.final_layers[step if len(self.final_layers) > 1 else 0]
        assert isinstance(layer, FinalLayer)
        return layer

    def modulation(self, labels: Tensor) -> list[Tensor]:
        """The modulation of all S steps. Nothing is checked here.

        Args:
            labels: (B,) int64 or int32 in 0..num_classes-1, on the device of the weights.

        Returns:
            Of every layer (B, S, 6, D), and last of the final norm (B, S, 2, D); in the dtype of the weights,
            under autocast in its dtype.
        """
        own = isinstance(self.y_embedder, LabelEmbedder)  # and no subclass's
        rows = self.y_embedder(labels, null=False) if own else self.y_embedder(labels)
        condition = self.t_embedder(self.times) + rows.unsqueeze(1)  # (B, S, D)
        tables = [layer.adaLN_modulation(condition) for layer in self.blocks]  # type: ignore[operator]
        final = [self._final(s).adaLN_modulation(condition[:, s : s + 1]) for s in range(self.steps)]
        return [*tables, torch.cat(final, 1)]

    def embed(self, states: Tensor) -> Tensor:
        """(B, s, C, h, w) -> (B, s*L, D)."""
        tokens = self.x_embedder(states.flatten(0, 1)) + self.pos_embed
        return tokens.unflatten(0, states.shape[:2]).flatten(1, 2)  # type: ignore[no-any-return]

    def _predict(self, y: Tensor, state: Tensor, step: int) -> Tensor:
        linear = self._final(step).linear
        if self.transitions is None:
            return unpatchify(linear(y), self.grid, self.patch_size)
        a, b = self.transitions[step]
        # Not under autocast: of an eps teacher, b is -10 and its rounding error as many times larger.
        with torch.autocast(y.device.type, enabled=False):
            output = unpatchify(linear(y.to(linear.weight.dtype)), self.grid, self.patch_size)
        return a * state + b * output  # in the wider of their dtypes

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """One teacher-forced pass over all states.

        Args:
            states: (B, S, C, h, w), the noise and states 1..S-1, in the dtype of the weights or under
                autocast.
            labels: (B,) int64 or int32 in 0..num_classes-1: guidance is in the weights, so that there is no
                null class. On a GPU another one ends in the kernel's assertion.

        Returns:
            (B, S, C, h, w), the predictions of states 1..S, in the dtype of the weights, under autocast in
            its dtype; with transitions in that of the states, if it is wider.

        Raises:
            ValueError: a type, shape, dtype or device that does not fit; the message names it.
        """
        shape = (self.steps, self.channels, *self.input_size)
        check_inputs("ARDTransformer", self.pos_embed, shape, {"states": states, "labels": labels})
        if labels.device.type == "cpu":  # on a GPU the host would wait for the values
            check_labels("ARDTransformer", labels, self.num_classes)
        parts = self.trunk(states, labels).unflatten(1, (self.steps, -1)).unbind(1)
        return torch.stack([self._predict(part, states[:, s], s) for s, part in enumerate(parts)], 1)

    def trunk(self, states: Tensor, labels: Tensor) -> Tensor:
        """`forward` up to the final linear layers: (B, S*L, D)."""
        history = TeacherForced(self.layout, self.history_layers, self.mask, self._gate_columns())
        return run_layers(
            self.blocks, self.embed(states), self.modulation(labels), history, self.checkpointing
        )[0]

    def _gate_columns(self) -> GateColumns | None:
        gates = self.history_gates
        return None if gates is None else gates.columns(self.layout, self.width // self.heads)

    def cache(self, batch: int, device: torch.device) -> KVCache:
        """An empty cache for `step`. Nothing is checked here.

        Args:
            batch: B.
            device: of the states.

        Returns:
            Keys and values, (N, B, S*L, H, Dh) each, N = history_layers; in the dtype of the weights, under
            autocast in its dtype.
        """
        return KVCache(
            self.layout,
            self.history_layers,
            self.mask,
            batch,
            self.heads,
            self.width // self.heads,
            autocast_dtype(device) or self.pos_embed.dtype,
            device,
            self._gate_columns(),
        )

    def step(self, state: Tensor, step: int, tables: Sequence[Tensor], cache: KVCache) -> Tensor:
        """One step of sampling: state s (B, C, h, w) -> the prediction of state s+1.

        `tables` is what `modulation` returned; `cache` holds the earlier steps of the same samples.
        """
        cache.start(step)
        own = [table[:, step : step + 1] for table in tables]
        y, _ = run_layers(self.blocks, self.embed(state.unsqueeze(1)), own, cache)
        return self._predict(y, state, step)


def _are_times(times: Sequence[float], steps: int) -> bool:
    try:
        return len(times) == steps and all(map(math.isfinite, times))
    except (TypeError, ValueError, RuntimeError, OverflowError):  # what has no length, or holds no numbers
        return False


def _are_transitions(transitions: Sequence[Sequence[float]], steps: int) -> bool:
    try:
        return len(transitions) == steps and all(_are_times(pair, 2) for pair in transitions)
    except TypeError:
        return False


def _without_variance(dit: DiT) -> FinalLayer:
    """The teacher's final layer without the outputs that predict a variance."""
    if not dit.learn_sigma:
        return dit.final_layer
    final = FinalLayer(dit.width, dit.patch_size, dit.channels).to(dit.final_layer.linear.weight)
    final.adaLN_modulation = dit.final_layer.adaLN_modulation
    outputs = (dit.patch_size**2, 2 * dit.channels)  # of each patch pixel, its channels
    with torch.no_grad():
        final.linear.weight.copy_(
            dit.final_layer.linear.weight.unflatten(0, outputs)[:, : dit.channels].flatten(0, 1)
        )
        final.linear.bias.copy_(
            dit.final_layer.linear.bias.unflatten(0, outputs)[:, : dit.channels].flatten()
        )
    return final
