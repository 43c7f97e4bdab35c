"""The DiT teacher is the published one; the ARD student is one function in training and in sampling."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ard.diffusion import Diffusion
from ard.layouts import released_checkpoint, to_diffusers
from ard.models import PRESETS, ARDTransformer, DiT
from ard.models.dit import AdaLNModulation, Attention, position_embedding
from ard_kernels.layout import MASKS, Mask

_TINY = {
    "input_size": (4, 8),
    "patch_size": 2,
    "channels": 3,
    "width": 24,
    "depth": 4,
    "heads": 3,
    "num_classes": 7,
}
_EPS32 = torch.finfo(torch.float32).eps


def _randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights without zeros: a fresh DiT is the identity, in which most mistakes are invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def _teacher(**options: object) -> DiT:
    dit = DiT(**{**_TINY, **options})  # type: ignore[arg-type]
    _randomise(dit)
    return dit


def _student(
    steps: int = 3, layers: int = 2, mask: Mask = "causal", per_step_final: bool = True
) -> ARDTransformer:
    student = ARDTransformer.from_teacher(_teacher(), steps, layers, mask, per_step_final)
    _randomise(student, seed=1)  # final layers that differ
    return student


def _states(student: ARDTransformer, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (batch, student.steps, student.channels, *student.input_size)
    return torch.randn(shape, generator=generator), torch.arange(batch) % student.num_classes


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())


# Teacher


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_size(name: str) -> None:
    """DiT, table 1: 33, 130, 458 and 675 million; the patch size moves little, and is added exactly."""
    with torch.device("meta"):
        dit = DiT.from_preset(name)
    published = {"S": 32.96e6, "B": 130.5e6, "L": 458e6, "XL": 675.1e6}[name.split("-")[1].split("/")[0]]
    patch, width = dit.patch_size, dit.width
    beyond_patch_2 = (patch**2 - 4) * (4 * width + 8 * width + 8)
    size = sum(p.numel() for p in dit.parameters() if p.requires_grad)
    assert all(p.is_meta for p in dit.parameters())
    assert size - beyond_patch_2 == pytest.approx(published, rel=5e-3)


def test_state_dict_is_that_of_the_public_release() -> None:
    dit = DiT.from_preset("DiT-S/8", input_size=32)
    expected: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 16, 384),
        "x_embedder.proj.weight": (384, 4, 8, 8),
        "x_embedder.proj.bias": (384,),
        "t_embedder.mlp.0.weight": (384, 256),
        "t_embedder.mlp.0.bias": (384,),
        "t_embedder.mlp.2.weight": (384, 384),
        "t_embedder.mlp.2.bias": (384,),
        "y_embedder.embedding_table.weight": (1001, 384),
        "final_layer.linear.weight": (8 * 8 * 8, 384),
        "final_layer.linear.bias": (8 * 8 * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * 384, 384),
        "final_layer.adaLN_modulation.1.bias": (2 * 384,),
    }
    linears = {
        "attn.qkv": (3, 1),
        "attn.proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
        "adaLN_modulation.1": (6, 1),
    }
    for i in range(12):
        for name, (out, into) in linears.items():
            expected[f"blocks.{i}.{name}.weight"] = (out * 384, into * 384)
            expected[f"blocks.{i}.{name}.bias"] = (out * 384,)
    assert {name: tuple(value.shape) for name, value in dit.state_dict().items()} == expected


def _plain_dit(w: dict[str, Tensor], config: dict[str, int], x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """DiT from its paper's equations, nothing shared with `ard.models`."""
    p, heads, depth, d = config["patch_size"], config["heads"], config["depth"], config["width"]
    batch, channels, height, width = x.shape

    corners = [(r, c) for r in range(0, height, p) for c in range(0, width, p)]
    kernel = w["x_embedder.proj.weight"]
    patches = [torch.einsum("bcij,dcij->bd", x[:, :, r : r + p, c : c + p], kernel) for r, c in corners]
    h = torch.stack(patches, 1) + w["x_embedder.proj.bias"] + w["pos_embed"]

    omega = 10000.0 ** (-torch.arange(128, dtype=torch.float32) / 128)
    angles = (t.float()[:, None] * omega).double()
    e = torch.cat([torch.cos(angles), torch.sin(angles)], 1)
    e = e @ w["t_embedder.mlp.0.weight"].T + w["t_embedder.mlp.0.bias"]
    e = (e / (1 + torch.exp(-e))) @ w["t_embedder.mlp.2.weight"].T + w["t_embedder.mlp.2.bias"]
    c = e + w["y_embedder.embedding_table.weight"][labels]
    c = c / (1 + torch.exp(-c))

    def linear(name: str, v: Tensor) -> Tensor:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(v: Tensor) -> Tensor:
        return (v - v.mean(-1, keepdim=True)) / torch.sqrt(v.var(-1, unbiased=False, keepdim=True) + 1e-6)

    def gelu(v: Tensor) -> Tensor:
        return v / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    for i in range(depth):
        b = f"blocks.{i}"
        m = [row[:, None] for row in linear(f"{b}.adaLN_modulation.1", c).split(d, 1)]
        qkv = linear(f"{b}.attn.qkv", norm(h) * (1 + m[1]) + m[0])
        out = []
        for j in range(heads):
            size = d // heads
            q, k, v = (qkv[..., n * d + j * size : n * d + (j + 1) * size] for n in range(3))
            scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(size))
            out.append(scores / scores.sum(-1, keepdim=True) @ v)
        h = h + m[2] * linear(f"{b}.attn.proj", torch.cat(out, -1))
        h = h + m[5] * linear(f"{b}.mlp.fc2", gelu(linear(f"{b}.mlp.fc1", norm(h) * (1 + m[4]) + m[3])))
    m = [row[:, None] for row in linear("final_layer.adaLN_modulation.1", c).split(d, 1)]
    tokens = linear("final_layer.linear", norm(h) * (1 + m[1]) + m[0])  # (B, L, p*p*2C)
    image = torch.empty(batch, 2 * channels, height, width, dtype=x.dtype)
    for n, (r, col) in enumerate(corners):
        patch = tokens[:, n].view(batch, p, p, 2 * channels)
        image[:, :, r : r + p, col : col + p] = patch.permute(0, 3, 1, 2)
    return image


@pytest.mark.parametrize(
    "options", [{}, {"input_size": 8, "patch_size": 4}, {"channels": 1, "heads": 2, "depth": 1}]
)
def test_numerics_are_the_papers(options: dict[str, int]) -> None:
    dit = _teacher(**options).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, dit.channels, *dit.input_size, generator=generator, dtype=torch.float64)
    t, labels = torch.tensor([999.0, 249.75, 0.0]), torch.tensor([0, 6, 7])  # 7: no class
    weights = dict(dit.state_dict())
    # The time's angles are float32: near 1000 their last bit depends on how the frequencies are made.
    assert _relative(dit(x, t, labels), _plain_dit(weights, dit.config, x, t, labels)) < 1e-4
    # At time zero nothing is float32.
    assert _relative(dit(x, 0 * t, labels), _plain_dit(weights, dit.config, x, 0 * t, labels)) < 1e-12


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 2), (4, 4)])
def test_position_embedding(grid: tuple[int, int]) -> None:
    """Sine then cosine of the column, then of the row, at 10000^(-i / (width/4))."""
    width = 16
    table = position_embedding(width, grid)
    assert table.shape == (1, grid[0] * grid[1], width)
    assert table.dtype == torch.float32
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = [
                function(position * 10000.0 ** (-i / 4))
                for position in (column, row) for function in (math.sin, math.cos) for i in range(4)
            ]  # fmt: skip
            got = table[0, row * grid[1] + column].tolist()
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_fresh_teacher_predicts_zero() -> None:
    """adaLN-zero: before training the last layer is zero."""
    dit = DiT(**_TINY)  # type: ignore[arg-type]
    assert not dit(torch.randn(1, 3, 4, 8), torch.tensor([5.0]), torch.tensor([1])).any()


# Student


def _sample_with(student: ARDTransformer, states: Tensor, labels: Tensor) -> Tensor:
    """Cached sampling that is fed the given states instead of its own predictions."""
    tables, cache = student.modulation(labels), student.cache(len(labels), states.device)
    if cache.keys.numel():  # what no step has written must not be read
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
    return torch.stack([student.step(states[:, s], s, tables, cache) for s in range(student.steps)], 1)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layers", [0, 1, 2, 4])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@torch.no_grad()
def test_training_pass_is_cached_sampling(mask: Mask, layers: int, steps: int) -> None:
    student = _student(steps, layers, mask)
    states, labels = _states(student)
    assert _relative(_sample_with(student, states, labels), student(states, labels)) < 1e-5


@torch.no_grad()
def test_one_step_is_the_teacher() -> None:
    """S = 1: the teacher at t = 999, without its variance."""
    teacher = _teacher()
    student = ARDTransformer.from_teacher(teacher, steps=1, history_layers=2)
    x, labels = torch.randn(2, 3, 4, 8), torch.tensor([3, 6])
    expected = teacher(x, torch.full((2,), 999.0), labels)[:, :3]
    assert _relative(student(x.unsqueeze(1), labels)[:, 0], expected) < 10 * _EPS32


@torch.no_grad()
def test_no_history_is_the_teacher_at_each_time() -> None:
    """N = 0: every state alone, at t = 999 (S-s)/S, whatever the mask."""
    teacher = _teacher()
    student = ARDTransformer.from_teacher(teacher, steps=4, history_layers=0)
    states, labels = _states(student)
    out = student(states, labels)
    for s, t in enumerate((999.0, 749.25, 499.5, 249.75)):
        assert _relative(out[:, s], teacher(states[:, s], torch.full((2,), t), labels)[:, :3]) < 10 * _EPS32


@pytest.mark.parametrize("per_step_final", [True, False])
def test_every_parameter_learns(per_step_final: bool) -> None:
    """The final layers of all steps above all."""
    student = _student(4, 2, per_step_final=per_step_final)
    states, labels = _states(student)
    assert len(student.final_layers) == (4 if per_step_final else 1)
    student(states, labels).square().mean().backward()
    for name, parameter in student.named_parameters():
        if name == "pos_embed":
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_final_layers_are_copies_of_the_teachers() -> None:
    """Equal at first and apart afterwards; nothing is shared with the teacher."""
    teacher = _teacher()
    student = ARDTransformer.from_teacher(teacher, steps=3, history_layers=1)
    first, *others = student.final_layers
    for other in others:
        for a, b in zip(first.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    theirs = {p.data_ptr() for p in teacher.parameters()}
    assert not theirs & {p.data_ptr() for p in student.parameters()}


@torch.no_grad()
def test_a_shared_final_layer_serves_every_step() -> None:
    student = _student(3, 2, per_step_final=False)
    states, labels = _states(student)
    before = student(states, labels)
    student.final_layers[0].linear.bias += 1.0  # type: ignore[union-attr, operator]
    assert torch.allclose(student(states, labels), before + 1.0, atol=1e-5)


def _visible(mask: Mask, query: int, key: int) -> bool:
    """Figure 5 of the paper, in words."""
    return {
        "causal": key <= query,
        "diagonal": key == query,
        "window": query - 1 <= key <= query,
        "anchor": key in (0, query),
    }[mask]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layers", [1, 4])
@torch.no_grad()
def test_a_state_reaches_only_what_the_mask_allows(mask: Mask, layers: int) -> None:
    """After n layers a state has travelled n steps through the mask; bitwise nothing else may change."""
    student = _student(4, layers, mask)
    states, labels = _states(student)
    out = student(states, labels)
    for j in range(4):
        reached = {j}
        for _ in range(layers):
            reached |= {i for i in range(4) for k in reached if _visible(mask, i, k)}
        changed = states.clone()
        changed[:, j] += 1.0
        different = {i for i in range(4) if not torch.equal(student(changed, labels)[:, i], out[:, i])}
        assert different == reached
        if mask == "causal":
            assert different == set(range(j, 4))


def test_checkpointing_changes_no_gradient() -> None:
    student = _student(3, 2)
    states, labels = _states(student)

    def gradients(checkpointing: bool) -> list[Tensor]:
        student.checkpointing = checkpointing
        parameters = [p for p in student.parameters() if p.requires_grad]
        return list(torch.autograd.grad(student(states, labels).square().mean(), parameters))

    for kept, computed_again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, computed_again)


@pytest.mark.parametrize("per_step_final", [True, False])
@torch.no_grad()
def test_modulation_is_made_once_per_sample_and_state(per_step_final: bool) -> None:
    """Never per token, neither in the training pass nor over a whole sampling run."""
    student = _student(3, 2, per_step_final=per_step_final)
    states, labels = _states(student, batch=2)
    rows: dict[str, int] = {}

    def counts(name: str) -> object:
        def hook(_: nn.Module, inputs: Sequence[Tensor], __: Tensor) -> None:
            rows[name] = rows.get(name, 0) + inputs[0].shape[:-1].numel()

        return hook

    for name, module in student.named_modules():
        if isinstance(module, AdaLNModulation):
            module[1].register_forward_hook(counts(name))  # type: ignore[arg-type]
    final = 2 if per_step_final else 6
    expected = {f"blocks.{i}.adaLN_modulation": 6 for i in range(4)}
    expected |= {f"final_layers.{s}.adaLN_modulation": final for s in range(3 if per_step_final else 1)}
    for use in (student, lambda x, y: _sample_with(student, x, y)):
        rows.clear()
        use(states, labels)
        assert rows == expected


def test_bad_arguments_are_named() -> None:
    teacher = _teacher()
    with pytest.raises(ValueError, match=r"history_layers is 5, .* 0\.\.4"):
        ARDTransformer.from_teacher(teacher, history_layers=5)
    with pytest.raises(ValueError, match="history_layers is -1"):
        ARDTransformer.from_teacher(teacher, history_layers=-1)
    with pytest.raises(ValueError, match="steps is 0"):
        ARDTransformer.from_teacher(teacher, steps=0, history_layers=1)
    with pytest.raises(ValueError, match="mask is 'full'"):
        ARDTransformer.from_teacher(teacher, history_layers=1, mask="full")  # type: ignore[arg-type]
    student = _student(3, 2)
    states, labels = _states(student)
    for wrong in (states[:, :2], states[..., :4], states[:, :, :2], states[:, 0]):
        with pytest.raises(ValueError, match=r"states has shape .* accepted is \(B, 3, 3, 4, 8\)"):
            student(wrong, labels)
    for wrong in (labels[:1], labels[:, None]):
        with pytest.raises(ValueError, match=r"ARDTransformer: labels has shape .*, accepted is \(2,\)"):
            student(states, wrong)
    x, t = states[:, 0], torch.tensor([999.0, 3.5])
    with pytest.raises(ValueError, match=r"DiT: x has shape \(2, 3, 4, 9\), accepted is \(B, 3, 4, 8\)"):
        teacher(torch.zeros(2, 3, 4, 9), t, labels)  # a convolution would drop the edge
    with pytest.raises(ValueError, match=r"DiT: t has shape \(1,\), accepted is \(2,\)"):
        teacher(x, t[:1], labels)
    with pytest.raises(ValueError, match=r"DiT: labels has shape \(2, 1\), accepted is \(2,\)"):
        teacher(x, t, labels[:, None])
    for name in ("patch_size", "channels", "depth", "heads", "num_classes", "input_size"):
        with pytest.raises(ValueError, match=f"DiT: {name} is 0, accepted is an integer >= 1"):
            DiT(**{**_TINY, name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="teacher is ARDTransformer, accepted is a DiT"):
        ARDTransformer.from_teacher(student)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name is 'DiT-M/2'"):
        DiT.from_preset("DiT-M/2")
    with pytest.raises(ValueError, match=r"input_size is \(5, 4\)"):
        DiT(**{**_TINY, "input_size": (5, 4)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width is 22"):
        DiT(**{**_TINY, "width": 22})  # type: ignore[arg-type]


_COUNTS = ("patch_size", "channels", "width", "depth", "heads", "num_classes")


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        *[(name, value, "is an integer >= 1") for name in _COUNTS for value in (2.0, "2", True, None)],
        *[
            ("input_size", value, "is an integer >= 1, or height and width")
            for value in (8.0, "8", "48", True, None, 0, (4,), (4, 8, 4), (4, 8.0), (4, 0))
        ],
        # 1/25: less than one hidden channel at width 24
        *[
            ("mlp_ratio", value, r"is a finite number >= 1/24")
            for value in (0, -1, 1 / 25, math.nan, math.inf, "4", True, None)
        ],
        *[
            (name, value, "are True and False")
            for name in ("null_class", "learn_sigma")
            for value in (2, "no")
        ],
    ],
)
def test_a_bad_option_of_a_teacher_is_named(name: str, value: object, accepted: str) -> None:
    with pytest.raises(ValueError, match=rf"^DiT: {name} is {re.escape(repr(value))}, accepted {accepted}"):
        DiT(**{**_TINY, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("diffusion", [None, Diffusion("cosine", "v", timesteps=101)])
@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        *[("steps", value, "is an integer >= 1") for value in (2.0, "2", True, None, -1)],
        *[("history_layers", value, r"are 0\.\.4 \(integers\)") for value in (1.5, "1", True, None)],
        *[("per_step_final", value, "are True and False") for value in ("no", 1, None)],
        *[
            ("times", value, r"are 2 \(steps\) finite numbers")
            for value in (5, "42", ["4", "2"], [None, 2.0], [10**400, 2.0], [[4.0], [2.0]], [math.nan, 2.0])
        ],
    ],
)
def test_a_bad_option_of_a_student_is_named(
    name: str, value: object, accepted: str, diffusion: Diffusion | None
) -> None:
    """A student of a teacher that knows its process asks that one for times."""
    teacher = _teacher()
    teacher.diffusion = diffusion
    options: dict[str, Any] = {"steps": 2, "history_layers": 1, name: value}
    message = rf"^ARDTransformer: {name} is {re.escape(repr(value))}, accepted {accepted}"
    with pytest.raises(ValueError, match=message):
        ARDTransformer.from_teacher(teacher, **options)
    with pytest.raises(ValueError, match=message):
        ARDTransformer(teacher.config, **options)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (model, change, message)
        for model, first, others in (("DiT", "x", ("t", "labels")), ("ARDTransformer", "states", ("labels",)))
        for change, message in (
            *[
                ({name: convert}, f"{name} {told}")
                for name in (first, *others)
                for convert, told in (
                    (Tensor.numpy, "is ndarray, accepted is a Tensor"),
                    (Tensor.tolist, "is list, accepted is a Tensor"),
                    (lambda value: value.to("meta"), "is on meta, accepted is cpu, where the weights are"),
                )
            ],
            ({first: Tensor.int}, rf"{first} is torch\.int32, accepted is torch\.float32 as the weights are"),
            ({first: Tensor.double}, rf"{first} is torch\.float64, accepted is torch\.float32"),
            ({first: Tensor.bfloat16}, rf"{first} is torch\.bfloat16, accepted is torch\.float32"),
            ({"labels": Tensor.float}, r"labels is torch\.float32, accepted are int64 and int32"),
            ({"labels": Tensor.bool}, r"labels is torch\.bool, accepted are int64 and int32"),
        )
    ],
)
def test_a_bad_input_is_named(model: str, change: dict[str, Callable[..., object]], message: str) -> None:
    network, inputs = _inputs(model)
    inputs = {name: change.get(name, lambda value: value)(value) for name, value in inputs.items()}
    with pytest.raises(ValueError, match=f"^{model}: {message}"):
        network(**inputs)


def _inputs(model: str) -> tuple[nn.Module, dict[str, Any]]:
    student = _student(3, 2)
    states, labels = _states(student)
    if model == "ARDTransformer":
        return student, {"states": states, "labels": labels}
    return _teacher(), {"x": states[:, 0], "t": torch.tensor([999.0, 3.5]), "labels": labels}


@pytest.mark.parametrize("model", ["DiT", "ARDTransformer"])
@torch.no_grad()
def test_an_input_of_another_dtype_is_for_autocast(model: str) -> None:
    """And labels may be int32. What autocast does not cast is refused there, too."""
    network, inputs = _inputs(model)
    first = next(iter(inputs))
    narrow = {**inputs, first: inputs[first].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        exact = network(**{**inputs, first: narrow[first].float(), "labels": inputs["labels"].int()})
        assert torch.equal(network(**narrow), exact)
        for convert in (Tensor.double, Tensor.int):
            with pytest.raises(ValueError, match=rf"{first} is torch\..*, or under autocast torch\.float32"):
                network(**{**inputs, first: convert(inputs[first])})


@pytest.mark.parametrize("model", ["DiT", "ARDTransformer"])
def test_values_of_inputs_are_not_looked_at(model: str) -> None:
    """A look would wait for the GPU: without data everything but values is known."""
    network, inputs = _inputs(model)
    out = network.to("meta")(**{name: value.to("meta") for name, value in inputs.items()})
    assert out.is_meta


def test_compiles_without_graph_breaks() -> None:
    """From cold: nothing ran before the compiled call, so tracing finds nothing cached."""
    student = _student(3, 2)
    states, labels = _states(student)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    parameters = [p for p in student.parameters() if p.requires_grad]
    out, expected = compiled(states, labels), student(states, labels)
    assert _relative(out, expected) < 1e-6
    grads = [torch.autograd.grad(x.square().mean(), parameters) for x in (out, expected)]
    largest = max(g.norm() for g in grads[1])  # a bias of keys has no gradient but rounding
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() < 1e-5 * largest


def test_the_teacher_compiles_without_graph_breaks() -> None:
    dit = _teacher()
    arguments = torch.randn(2, 3, 4, 8), torch.tensor([999.0, 3.5]), torch.tensor([1, 7])
    compiled = torch.compile(dit, fullgraph=True, backend="aot_eager")
    assert _relative(compiled(*arguments), dit(*arguments)) < 1e-6


@pytest.mark.parametrize(
    ("diffusion", "times"),
    [
        (None, [999.0, 749.25, 499.5, 249.75]),
        (Diffusion("linear", "eps"), [999.0, 749.25, 499.5, 249.75]),
        (Diffusion("cosine", "v", timesteps=101), [100.0, 75.0, 50.0, 25.0]),
        (Diffusion("flow-to-data", "velocity", time_scale=1.0), [0.0, 0.25, 0.5, 0.75]),
        (Diffusion("flow-to-noise", "velocity", time_scale=1000.0), [1000.0, 750.0, 500.0, 250.0]),
    ],
)
def test_a_student_has_the_times_of_its_teachers_process(
    diffusion: Diffusion | None, times: list[float]
) -> None:
    teacher = _teacher()
    teacher.diffusion = diffusion
    student = ARDTransformer.from_teacher(teacher, history_layers=1)
    assert student.times.tolist() == times
    assert ARDTransformer(**student.config).times.tolist() == times
    asked = ARDTransformer.from_teacher(teacher, history_layers=1, times=[4.0, 3.0, 2.0, 1.0])
    assert asked.times.tolist() == [4.0, 3.0, 2.0, 1.0]


class QKNorm(DiT):
    """A teacher of one's own: other layers, an argument of their own."""

    def __init__(self, norm_eps: float = 1e-6, **options: Any) -> None:
        super().__init__(**options)
        self.config["norm_eps"] = norm_eps
        for block in self.blocks:
            block.attn = _QKNormAttention(self.width, self.heads, norm_eps)  # type: ignore[assignment]


class _QKNormAttention(Attention):
    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__(width, heads)
        self.norm = nn.RMSNorm(width // heads, eps)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return super().forward(x, lambda q, k, v: attend(self.norm(q), self.norm(k), v))


def test_a_teacher_of_ones_own_is_a_teacher(tmp_path: Path) -> None:
    """Saved, loaded, distilled and sampled like DiT; its layers and its argument are where they belong."""
    teacher = QKNorm(norm_eps=0.5, **_TINY)
    _randomise(teacher)
    teacher.diffusion = Diffusion("linear", "v")
    teacher.save_pretrained(tmp_path / "teacher")
    again = DiT.from_pretrained(tmp_path / "teacher")
    assert type(again) is QKNorm
    assert again.blocks[0].attn.norm.eps == 0.5  # type: ignore[union-attr]
    x, t, labels = torch.randn(2, 3, 4, 8), torch.tensor([999.0, 3.5]), torch.tensor([1, 6])
    assert torch.equal(again(x, t, labels), teacher.eval()(x, t, labels))
    student = ARDTransformer.from_teacher(teacher, steps=3, history_layers=2)
    _randomise(student)
    states, labels = _states(student)
    assert _relative(_sample_with(student, states, labels), student(states, labels)) < 100 * _EPS32
    student.save_pretrained(tmp_path / "student")
    loaded = ARDTransformer.from_pretrained(tmp_path / "student")
    loaded.requires_grad_()  # else torch.matmul folds the tokens otherwise, and AVX2 rounds otherwise
    assert torch.equal(loaded(states, labels), student(states, labels))
    plain = _teacher()
    plain.diffusion = teacher.diffusion
    plain.save_pretrained(tmp_path / "plain")
    assert "teacher_class" not in ARDTransformer.from_teacher(plain, history_layers=1).config
    with pytest.raises(ValueError, match="holds a DiT, wanted is a QKNorm"):
        QKNorm.from_pretrained(tmp_path / "plain")
    for model in (teacher, student):
        with pytest.raises(ValueError, match="class"):
            released_checkpoint(model)
    with pytest.raises(ValueError, match="class"):
        to_diffusers(teacher)


def test_a_class_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = QKNorm(**_TINY)
    teacher.diffusion = Diffusion("linear", "v")
    teacher.save_pretrained(tmp_path / "teacher")
    ARDTransformer.from_teacher(teacher, history_layers=1).save_pretrained(tmp_path / "student")
    monkeypatch.delitem(DiT.classes, "QKNorm")
    with pytest.raises(ValueError, match="holds a QKNorm, wanted is a DiT, or a subclass whose module"):
        DiT.from_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"teacher_class is 'QKNorm', known here are DiT.*; import"):
        ARDTransformer.from_pretrained(tmp_path / "student")


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    """Layers that no class makes again."""
    changed = _teacher()
    changed.blocks[0].attn.norm = nn.LayerNorm(8)  # type: ignore[union-attr]
    student = ARDTransformer.from_teacher(changed, history_layers=1)
    with pytest.raises(ValueError, match=r"save: does not fit .*unexpected blocks\.0\.attn\.norm\.weight"):
        student.save_pretrained(tmp_path / "student")

    class Student(ARDTransformer):
        pass

    own = Student(student.config["teacher"], history_layers=1)
    with pytest.raises(ValueError, match=r"the model is a Student .*, accepted .* ARDTransformer"):
        own.save_pretrained(tmp_path / "student")
    assert not [*tmp_path.rglob("*.safetensors")]


@pytest.mark.parametrize("wrong", [-1, 7, 8, 1000])
def test_a_label_that_is_not_there_is_an_error(wrong: int) -> None:
    """The null class, 7 here, too: a student's weights hold the guidance. A teacher takes it."""
    student, given = _inputs("ARDTransformer")
    given["labels"][1] = wrong
    with pytest.raises(ValueError, match=rf"ARDTransformer: labels are .*{wrong}.*, accepted are 0\.\.6"):
        student(**given)
    teacher, given = _inputs("DiT")
    given["labels"][1] = wrong
    if wrong == 7:
        assert teacher(**given).isfinite().all()
        return
    with pytest.raises(ValueError, match=rf"DiT: labels are .*{wrong}.*, accepted are 0\.\.7"):
        teacher(**given)


def test_the_null_class_is_out_of_range_where_values_are_not_read() -> None:
    """As on a GPU, whose kernel then stops: the student's rows end before it, in every pass."""
    student, given = _inputs("ARDTransformer")
    given["labels"][1] = 7
    with pytest.raises(IndexError):
        student.modulation(given["labels"])
