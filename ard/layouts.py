"""A model's weights in the layouts of other code: names, shapes, and what that code cannot hold.

The names of our DiT are those of the public DiT. The code which the authors of ARD released keeps a student
as a DiT with a final layer per step: `final_layer`, `final_layer2`, .. In diffusers every block has a copy of
the embedders, and q, k and v are apart (its scripts/convert_dit_to_diffusers.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ard.checkpoints import CONFIG, check_fit, describing, load_weights
from ard.models import ARDTransformer, DiT
from ard.models.dit import TimeFrequencies, position_embedding
from ard.models.student import student_times


def _require(name: str, found: object, accepted: object, layout: str) -> None:
    if found != accepted:
        raise ValueError(f"{name} is {found!r}, {layout} can only hold {accepted!r}")


# Students of the released code.


def _released_final(step: int) -> str:
    return f"final_layer{step + 1 if step else ''}"


def released_steps(tensors: Mapping[str, Tensor]) -> int:
    """How many final layers there are without a gap."""
    steps = 0
    while f"{_released_final(steps)}.linear.weight" in tensors:
        steps += 1
    return steps


def _to_released(student: ARDTransformer) -> dict[str, Tensor]:
    tensors = {n: t for n, t in student.state_dict().items() if not n.startswith("final_layers.")}
    for step in range(student.steps):
        final = student.final_layers[step if len(student.final_layers) > 1 else 0]
        for name, tensor in final.state_dict().items():
            if name.startswith("linear."):
                # There every pixel of a patch has a variance for each channel, which nothing reads.
                state = tensor.unflatten(0, (student.patch_size**2, student.channels))
                tensor = torch.cat([state, torch.zeros_like(state)], 1).flatten(0, 1)
            tensors[f"{_released_final(step)}.{name}"] = tensor
    return tensors


def released_checkpoint(model: DiT | ARDTransformer) -> dict[str, Any]:
    """What torch.save makes a checkpoint of for the code that a model's method comes from.

    A teacher: the state dict, for the code of the public DiT. A student, for the authors' ARD: the weights
    under "model" and "ema", and under "args" what they do not say, N as "stack" and all else as "ard". That
    code runs 4 steps; other numbers are written by the same naming. A final layer that all steps share is
    written for each of them.

    Raises:
        ValueError: for a model which that code could not run: diffusers' time frequencies, or a student with
            another mask or other times than the released ones, or without a null class.
    """
    if isinstance(model, DiT):
        _require("class", type(model).__name__, "DiT", "the public DiT's code")
        _require("time_frequencies", model.config["time_frequencies"], "dit", "the public DiT's code")
        return model.state_dict()
    layout, dit = "the released code", model.config["teacher"]
    _require("teacher_class", model.config.get("teacher_class", "DiT"), "DiT", layout)
    _require("time_frequencies", dit["time_frequencies"], "dit", layout)
    _require("null_class", dit["null_class"], True, layout)
    _require("mask", model.mask if model.history_layers else "causal", "causal", layout)
    _require("head", model.head, "direct", layout)
    _require("gated_history", model.history_gates is not None, False, layout)
    _require("times", model.times.tolist(), student_times(model.steps).tolist(), layout)
    tensors = _to_released(model)
    ours = {"config": {**model.config, "per_step_final": True}, "trajectories": model.trajectories}
    arguments = {"stack": model.history_layers, "ard": json.dumps(ours)}
    return {"model": tensors, "ema": tensors, "args": arguments}


def from_released(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], trajectories: dict[str, Any], source: object
) -> ARDTransformer:
    """The student of tensors under the released code's names, in evaluation mode and without gradients.

    Args:
        config: the arguments of ARDTransformer, with a final layer per step.
        trajectories: what it was trained on, as its folder will record it.
        source: named in errors.

    Raises:
        ValueError: tensors that do not fit, all of them listed.
    """
    with describing(source, "student"):
        student = ARDTransformer(**config)
    check_fit(_to_released(student), tensors, source)
    own = {}
    for name in student.state_dict():
        if not name.startswith("final_layers."):
            own[name] = tensors[name]
            continue
        _, step, rest = name.split(".", 2)
        own[name] = tensors[f"{_released_final(int(step))}.{rest}"]
        if rest.startswith("linear."):
            outputs = own[name].unflatten(0, (student.patch_size**2, 2 * student.channels))
            own[name] = outputs[:, : student.channels].flatten(0, 1)
    load_weights(student, own, source)
    student.trajectories = trajectories
    return student.eval().requires_grad_(False)


# diffusers' DiTTransformer2DModel.

# Its constructor's defaults: what a config.json leaves out. `_FIXED` is what our DiT computes.
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None,
    "num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_eps": 1e-5,
}  # fmt: skip
_FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}  # fmt: skip
_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is its name in old folders


def _diffusers_names(depth: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Our modules and diffusers': those that are there in equal copies (mostly one), and those that are there
    in parts."""
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    copies = {
        "x_embedder.proj": ["pos_embed.proj"],
        "t_embedder.mlp.0": [f"{block}.norm1.emb.timestep_embedder.linear_1" for block in blocks],
        "t_embedder.mlp.2": [f"{block}.norm1.emb.timestep_embedder.linear_2" for block in blocks],
        "y_embedder.embedding_table": [
            f"{block}.norm1.emb.class_embedder.embedding_table" for block in blocks
        ],
        "final_layer.adaLN_modulation.1": ["proj_out_1"],
        "final_layer.linear": ["proj_out_2"],
    }
    parts = {}
    for i, block in enumerate(blocks):
        copies[f"blocks.{i}.adaLN_modulation.1"] = [f"{block}.norm1.linear"]
        copies[f"blocks.{i}.attn.proj"] = [f"{block}.attn1.to_out.0"]
        copies[f"blocks.{i}.mlp.fc1"] = [f"{block}.ff.net.0.proj"]
        copies[f"blocks.{i}.mlp.fc2"] = [f"{block}.ff.net.2"]
        parts[f"blocks.{i}.attn.qkv"] = [f"{block}.attn1.to_{part}" for part in "qkv"]
    return copies, parts


def _to_diffusers(teacher: DiT) -> dict[str, Tensor]:
    copies, parts = _diffusers_names(teacher.depth)
    tensors = {}
    for name, tensor in teacher.state_dict().items():
        module, _, kind = name.rpartition(".")
        for other in copies.get(module, ()):
            tensors[f"{other}.{kind}"] = tensor
        for other, part in zip(parts.get(module, ()), tensor.chunk(3), strict=False):
            tensors[f"{other}.{kind}"] = part
    return tensors


def to_diffusers(teacher: DiT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of diffusers' DiTTransformer2DModel with the teacher's weights.

    Its output is the teacher's if that has diffusers' time frequencies.

    Raises:
        ValueError: for a teacher that diffusers' class has no place for: an oblong input, no null class, an
            mlp_ratio other than 4, trained positions.
    """
    layout, config = "diffusers' DiT", teacher.config
    height, width = teacher.input_size
    _require("class", type(teacher).__name__, "DiT", layout)
    _require("input_size", (height, width), (height, height), layout)
    _require("null_class", config["null_class"], True, layout)
    _require("mlp_ratio", config["mlp_ratio"], 4.0, layout)
    positions = position_embedding(teacher.width, teacher.grid)
    # Two computations of the same sines in float64, rounded to float32, differ by less.
    same = torch.allclose(teacher.pos_embed.float().cpu(), positions, rtol=0, atol=1e-6)
    _require("the position embedding", "another" if not same else "fixed", "fixed", layout)
    description = {
        "_class_name": _CLASSES[0], **_FIXED, "num_attention_heads": teacher.heads,
        "attention_head_dim": teacher.width // teacher.heads, "in_channels": teacher.channels,
        "out_channels": teacher.channels * (1 + teacher.learn_sigma), "num_layers": teacher.depth,
        "sample_size": height, "patch_size": teacher.patch_size, "num_embeds_ada_norm": teacher.num_classes,
        "norm_eps": 1e-6,
    }  # fmt: skip
    return description, _to_diffusers(teacher)


def from_diffusers(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    frequencies: TimeFrequencies,
    source: object,
) -> DiT:
    """The teacher of a DiTTransformer2DModel, in evaluation mode and without gradients.

    Args:
        description: its config.json.
        frequencies: of the time embedding: with "diffusers" the output is that of diffusers' class.
        source: named in errors.

    Raises:
        ValueError: another class, settings that our DiT does not compute, tensors that do not fit (all of
            them listed), or embedders that differ between the blocks.
    """
    found = {**_DEFAULTS, **_FIXED, **description}
    accepted = {"_class_name": _CLASSES, **{name: (value,) for name, value in _FIXED.items()},
                # Only the norm before the MLP has it; 1e-5 there moves what is of order 1 by 5e-6.
                "norm_eps": (1e-5, 1e-6)}  # fmt: skip
    for name, values in accepted.items():
        if found.get(name) not in values:
            raise ValueError(f"{source}: its {CONFIG} says {name} is {found.get(name)!r}, accepted are "
                             f"{', '.join(map(repr, values))}")  # fmt: skip
    with describing(source, "teacher"):
        channels, heads = found["in_channels"], found["num_attention_heads"]
        outputs = found["out_channels"] or channels
        if outputs not in (channels, 2 * channels):
            raise ValueError(f"{source}: its {CONFIG} says out_channels is {outputs}, accepted are "
                             f"in_channels ({channels}) and twice as many")  # fmt: skip
        teacher = DiT(
            found["sample_size"], found["patch_size"], channels, heads * found["attention_head_dim"],
            found["num_layers"], heads, num_classes=found["num_embeds_ada_norm"],
            learn_sigma=outputs == 2 * channels, time_frequencies=frequencies,
        )  # fmt: skip
    check_fit(_to_diffusers(teacher), tensors, source)
    copies, parts = _diffusers_names(teacher.depth)
    own = {"pos_embed": teacher.pos_embed.detach()}
    for name in teacher.state_dict():
        module, _, kind = name.rpartition(".")
        if module in parts:
            own[name] = torch.cat([tensors[f"{other}.{kind}"] for other in parts[module]])
        elif module in copies:
            first, *others = (f"{other}.{kind}" for other in copies[module])
            own[name] = tensors[first]
            if differing := [other for other in others if not torch.equal(tensors[other], tensors[first])]:
                raise ValueError(f"{source}: {differing[0]} differs from {first}: the embedders of all "
                                 "blocks must be equal, a DiT has one of each")  # fmt: skip
    load_weights(teacher, own, source)
    return teacher.eval().requires_grad_(False)
