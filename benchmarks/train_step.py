"""One training step of the student against the same student written directly in PyTorch.

    python -m benchmarks.train_step                     # DiT-S/2, S = 4, N = 6, batch 4, bf16 autocast
    python -m benchmarks.train_step --compile           # both under torch.compile
    python -m benchmarks.train_step --profile           # what the student's step spends its time on

A step is forward, mean squared error, backward and a fused AdamW step. Both sides have the same weights,
precision and optimiser; outputs and gradients are compared in float32 before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ard.models import PRESETS, ARDTransformer, DiT
from ard.models.dit import DiTBlock, FinalLayer, unpatchify
from ard_kernels.layout import MASKS, BlockLayout
from benchmarks.common import RESULTS, environment, medians, write_json

# float32 sums in another order; DiT-S/2 measured 2e-7 for outputs and 1e-7 for gradients.
_TOLERANCE = 5e-6


class StraightforwardARD(nn.Module):
    """The student as one writes it from the paper: conditioning per token, a dense mask, torch's attention.

    Every token has its condition, (B, S*L, D), and adaLN's linear layers run on it. Attention is
    `scaled_dot_product_attention` over all S*L tokens with a float mask of -inf, made once; in sampling, keys
    and values of the history layers are kept by concatenation.
    """

    times: Tensor
    causal: Tensor
    diagonal: Tensor

    def __init__(self, student: ARDTransformer, dtype: torch.dtype) -> None:
        """Copies the weights of `student`; `dtype` is the one attention computes in."""
        super().__init__()
        student = copy.deepcopy(student)
        self.steps, self.history_layers, self.heads = student.steps, student.history_layers, student.heads
        self.grid, self.patch_size, self.tokens = student.grid, student.patch_size, student.layout.lengths[0]
        self.x_embedder, self.t_embedder, self.y_embedder = (
            student.x_embedder,
            student.t_embedder,
            student.y_embedder,
        )
        self.pos_embed, self.blocks, self.final_layers = (
            student.pos_embed,
            student.blocks,
            student.final_layers,
        )
        self.register_buffer("times", student.times)
        for name, mask in (("causal", student.mask), ("diagonal", "diagonal")):
            visible = student.layout.mask(mask, student.pos_embed.device)
            zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self.register_buffer(name, zeros.masked_fill(~visible, float("-inf")))

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """(B, S, C, h, w) -> (B, S, C, h, w), as `ARDTransformer.forward`."""
        batch, tokens = states.shape[0], self.tokens
        x = (self.x_embedder(states.flatten(0, 1)) + self.pos_embed).reshape(batch, self.steps * tokens, -1)
        c = self.t_embedder(self.times) + self.y_embedder(labels).unsqueeze(1)  # (B, S, D)
        c = c.repeat_interleave(tokens, 1)  # (B, S*L, D)
        for i, block in enumerate(self.blocks):
            mask = self.causal if i < self.history_layers else self.diagonal
            x = _layer(
                block,
                x,
                c,
                self.heads,
                lambda q, k, v, mask=mask: F.scaled_dot_product_attention(q, k, v, mask),
            )
        parts = zip(x.split(tokens, 1), c.split(tokens, 1), self._finals(), strict=True)
        return torch.stack([self._predict(final, *part) for *part, final in parts], 1)

    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise (B, C, h, w) -> the S predictions (B, S, C, h, w), causal history kept by concatenation."""
        state, path = noise, []
        kept: list[tuple[Tensor, Tensor] | None] = [None] * self.history_layers
        for s, final in enumerate(self._finals()):
            x = self.x_embedder(state) + self.pos_embed
            c = self.t_embedder(self.times[s : s + 1]) + self.y_embedder(labels)  # (B, D)
            c = c.unsqueeze(1).expand(-1, self.tokens, -1)  # (B, L, D)
            for i, block in enumerate(self.blocks):
                x = _layer(block, x, c, self.heads, self._keeping(kept, i))
            state = self._predict(final, x, c)
            path.append(state)
        return torch.stack(path, 1)

    def _keeping(
        self, kept: list[tuple[Tensor, Tensor] | None], i: int
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if i < self.history_layers:
                earlier = kept[i]
                if earlier is not None:
                    k, v = torch.cat([earlier[0], k], 2), torch.cat([earlier[1], v], 2)
                kept[i] = (k, v)
            return F.scaled_dot_product_attention(q, k, v)

        return attend

    def _finals(self) -> list[FinalLayer]:
        return [self.final_layers[s if len(self.final_layers) > 1 else 0] for s in range(self.steps)]  # type: ignore[misc]

    def _predict(self, final: FinalLayer, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = _modulation(final.adaLN_modulation, c).chunk(2, -1)
        return unpatchify(final.linear(_modulate(x, shift, scale)), self.grid, self.patch_size)


def _modulation(layers: nn.Sequential, c: Tensor) -> Tensor:
    return layers[1](layers[0](c))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _layer(
    block: DiTBlock, x: Tensor, c: Tensor, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    modulation = _modulation(block.adaLN_modulation, c)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    qkv = block.attn.qkv(_modulate(x, shift_attn, scale_attn))
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, tokens, Dh) each
    x = x + gate_attn * block.attn.proj(attend(q, k, v).transpose(1, 2).flatten(2))
    hidden = F.gelu(block.mlp.fc1(_modulate(x, shift_mlp, scale_mlp)), approximate="tanh")
    return x + gate_mlp * block.mlp.fc2(hidden)


def random_student(
    model: str | DiT, steps: int, history: int, mask: str, device: torch.device
) -> ARDTransformer:
    """A student, of a preset or of a given teacher, without zero weights: a fresh DiT is the identity, which
    hides any difference."""
    torch.manual_seed(0)
    teacher = DiT.from_preset(model) if isinstance(model, str) else model
    student = ARDTransformer.from_teacher(teacher, steps, history, mask)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return student.to(device)


def assert_same(a: Tensor, b: Tensor, what: str) -> None:
    """Relative difference, in the L2 norm, below a float32 tolerance."""
    error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
    if not error <= _TOLERANCE:
        raise AssertionError(f"{what} differ by {error:.1e}, accepted is {_TOLERANCE:.0e}")


def _assert_same_function(student: ARDTransformer, states: Tensor, targets: Tensor, labels: Tensor) -> None:
    """Outputs and gradients in float32."""
    plain = StraightforwardARD(student, torch.float32)
    a, b = student(states, labels), plain(states, labels)
    assert_same(a, b, "outputs")
    grads = []
    for model, out in ((student, a), (plain, b)):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads.append(
            dict(zip(named, torch.autograd.grad(F.mse_loss(out, targets), list(named.values())), strict=True))
        )
    largest = max(g.norm() for g in grads[1].values())
    for name, grad in grads[
        0
    ].items():  # relative to the largest: a bias of keys has a gradient of zero but for rounding
        error = (grad - grads[1][name]).norm() / largest
        if not error <= _TOLERANCE:
            raise AssertionError(f"gradients of {name} differ by {error:.1e}, accepted is {_TOLERANCE:.0e}")


def training_step(
    model: nn.Module, states: Tensor, targets: Tensor, labels: Tensor, compiled: bool
) -> Callable[[], None]:
    """A function that takes one step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(states.device.type, torch.bfloat16):
            prediction = forward(states, labels)
        F.mse_loss(prediction.float(), targets).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


# Names of operators, or how they begin; the first group that knows one has it.
_PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution"),
    "attention": ("ard_kernels::block_attention", "GeneratedBackwardFor_ard_kernels_block_attention"),
    "GELU": ("ard_kernels::gelu", "GeneratedBackwardFor_ard_kernels_gelu", "aten::gelu"),
    "adaLN, gated residual": ("ard_kernels::", "GeneratedBackwardFor_ard_kernels"),
    "optimiser": ("aten::_fused_adamw",),
    "casts, copies, zeros": ("aten::copy_", "aten::cat", "aten::fill_"),
    "gradients of biases": ("aten::sum",),
}


def profile(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """Shares of a step's time by part. What the profiler itself costs is among them."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            step()
    parts = dict.fromkeys([*_PARTS, "the rest"], 0.0)
    for event in profiler.key_averages():
        known = (part for part, names in _PARTS.items() if event.key.startswith(names))
        parts[next(known, "the rest")] += event.self_cpu_time_total
    total = sum(parts.values())
    return {part: time / total for part, time in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiT-S/2", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps-s", type=int, default=4, help="S, the states of a trajectory")
    parser.add_argument("--history", type=int, default=6, help="N, the history layers")
    parser.add_argument("--mask", default="causal", choices=MASKS)
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--profile", action="store_true", help="on CPU: time by part of the student's step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/train_step-DEVICE[-compile].json"
    )
    options = parser.parse_args()
    device = torch.device(options.device)

    student = random_student(options.model, options.steps_s, options.history, options.mask, device)
    shape = (options.batch, options.steps_s, student.channels, *student.input_size)
    states, targets = torch.randn(shape, device=device), torch.randn(shape, device=device)
    labels = torch.randint(0, student.num_classes, (options.batch,), device=device)
    _assert_same_function(student, states[:1], targets[:1], labels[:1])

    plain = StraightforwardARD(student, torch.bfloat16)
    step = training_step(student, states, targets, labels, options.compile)
    seconds = medians(
        {
            "ard": step,
            "straightforward": training_step(plain, states, targets, labels, options.compile),
        },
        options.repeats,
    )
    ratio = seconds["straightforward"] / seconds["ard"]
    layout = BlockLayout.uniform(options.steps_s, student.layout.lengths[0])
    print(f"{options.model}, batch {options.batch}, S={options.steps_s} ({layout.total} tokens), "
          f"N={options.history}, {options.mask}, bf16 autocast on {device}"
          + (", compiled" if options.compile else ""))  # fmt: skip
    for name, value in seconds.items():
        print(f"  {name:<16} {1e3 * value:9.1f} ms a step")
    print(f"  {ratio:.2f}x faster")
    parts = profile(step, options.repeats) if options.profile else {}
    for part, share in parts.items():
        print(f"  {part:<24} {100 * share:5.1f} %")
    name = f"train_step-{device.type}{'-compile' if options.compile else ''}.json"
    write_json(
        options.out or RESULTS / name,
        {"options": {k: v for k, v in vars(options).items() if k != "out"}, "seconds": seconds,
         "ratio": ratio, **({"profile": parts} if parts else {}), "environment": environment()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
