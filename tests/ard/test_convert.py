"""Weights keep every bit between the layouts, mean the same there, and what does not fit is refused whole."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny import TINY, randomise, tiny_teacher
from torch import Tensor, nn

from ard.checkpoints import (
    load_student,
    load_teacher,
    read_json,
    save_student,
    save_teacher,
    sha256,
    write_json,
)
from ard.convert import ConvertConfig, convert
from ard.diffusion import Diffusion
from ard.foreign import read_checkpoint
from ard.models import ARDTransformer, DiT
from ard.sampling import sample

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _same_folder(one: Path, other: Path) -> bool:
    """Descriptions and every bit of the weights."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return read_json(one / "config.json") == read_json(other / "config.json") and (
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    )


def _student(folder: Path, steps: int = 4, teacher: dict[str, Any] | None = None, **options: Any) -> Path:
    model = ARDTransformer.from_teacher(
        tiny_teacher(**(teacher or {})), steps, **{"history_layers": 1, **options}
    )
    randomise(model, 1)
    save_student(folder, model, {"teacher": "abc", "grid": [25, 15, 10, 5, 0], "state": "x0"})
    return folder


def _theirs(seed: int = 0, **options: Any) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
           "num_layers": 3, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, **options}
    )  # fmt: skip
    randomise(model, seed)
    with torch.no_grad():
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# The public DiT


@pytest.mark.parametrize("form", ["raw", "model", "ema", "safetensors"])
def test_a_public_dit_becomes_a_teacher(tmp_path: Path, form: str) -> None:
    dit = DiT.from_preset("DiT-S/8", 16, num_classes=5)
    randomise(dit, 3)
    weights, other = dit.state_dict(), {"x": torch.zeros(1)}
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(weights, file)
    else:
        # Their training script keeps its arguments beside the weights.
        rest = {"opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/8", lr=1e-4)}
        torch.save(
            {"raw": weights, "model": {"model": weights, **rest},
             "ema": {"model": other, "ema": weights, **rest}}[form], file
        )  # fmt: skip
    convert(ConvertConfig(file, tmp_path / "t", preset="DiT-S/8", input_size=16, num_classes=5,
                          noise_schedule="cosine", prediction="v"))  # fmt: skip
    teacher, diffusion = load_teacher(tmp_path / "t")
    assert diffusion.config == Diffusion("cosine", "v").config
    assert teacher.config == dit.config
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())


def test_arguments_in_a_checkpoint_do_not_carry_code(tmp_path: Path) -> None:
    """A namespace is allowed; what it holds must be data as well."""

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return eval, (f"open({str(tmp_path / 'executed')!r}, 'w')",)

    file = tmp_path / "w.pt"
    for args in (argparse.Namespace(stack=Evil()), {"stack": Evil()}):
        torch.save({"ema": tiny_teacher().state_dict(), "args": args}, file)
        with pytest.raises(ValueError, match=r"w\.pt: refused, it is not a file of plain tensors"):
            read_checkpoint(file)
        file.write_bytes(pickle.dumps({"args": args}))
        with pytest.raises(ValueError, match="refused"):
            read_checkpoint(file)
    assert not (tmp_path / "executed").exists()
    torch.save({"ema": tiny_teacher().state_dict(), "args": argparse.Namespace(stack=3)}, file)
    assert read_checkpoint(file).arguments == {"stack": 3}


def test_a_teacher_goes_to_the_public_layout_and_back(tmp_path: Path, teacher: Path) -> None:
    convert(ConvertConfig(teacher, tmp_path / "public.pt", to="released"))
    assert torch.load(tmp_path / "public.pt", weights_only=True).keys() == tiny_teacher().state_dict().keys()
    convert(ConvertConfig(tmp_path / "public.pt", tmp_path / "back", teacher=teacher))
    assert _same_folder(tmp_path / "back", teacher)


# Students of the released code


class _ReleasedFinal(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


def _released(dit: DiT) -> nn.Module:
    """A module with the attributes of the released student: the DiT's, and three further final layers."""
    rows = dit.final_layer.linear.out_features
    for name in ("final_layer2", "final_layer3", "final_layer4"):
        setattr(dit, name, _ReleasedFinal(dit.width, rows))
    randomise(dit, 5)
    return dit


def _plain_student(released: nn.Module, states: Tensor, labels: Tensor, layers: int) -> Tensor:
    """The released student's function as the paper describes it, with a dense mask: every
    token has the modulation of its own time, the lowest `layers` layers see all earlier states."""
    dit: Any = released
    steps, tokens, p = 4, dit.tokens, dit.patch_size
    x = torch.cat([dit.x_embedder(states[:, s]) + dit.pos_embed for s in range(steps)], 1)
    c = torch.cat(
        [(dit.t_embedder(torch.full((len(labels),), 999 * (4 - s) / 4)) + dit.y_embedder(labels))[:, None]
         .expand(-1, tokens, -1) for s in range(steps)], 1
    )  # fmt: skip
    block = torch.arange(steps * tokens) // tokens

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    for i, layer in enumerate(dit.blocks):
        a, b, g, d, e, f = layer.adaLN_modulation[1](nn.functional.silu(c)).chunk(6, -1)
        seen = block[:, None] >= block if i < layers else block[:, None] == block
        q, k, v = layer.attn.qkv(norm(x, a, b)).unflatten(-1, (3, dit.heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + g * layer.attn.proj(out.transpose(1, 2).flatten(2))
        x = x + f * layer.mlp(norm(x, d, e))
    predictions = []
    for s in range(steps):
        final = getattr(dit, f"final_layer{s + 1 if s else ''}")
        mine = slice(s * tokens, (s + 1) * tokens)
        shift, scale = final.adaLN_modulation[1](nn.functional.silu(c[:, mine])).chunk(2, -1)
        y = final.linear(norm(x[:, mine], shift, scale))
        h, w = dit.grid
        y = y.unflatten(-1, (p, p, -1)).unflatten(1, (h, w)).permute(0, 5, 1, 3, 2, 4)
        predictions.append(y.flatten(4, 5).flatten(2, 3)[:, : dit.channels])
    return torch.stack(predictions, 1)


@pytest.mark.parametrize("form", ["raw", "model", "ema"])
@torch.no_grad()
def test_a_released_student_does_here_what_it_did_there(tmp_path: Path, form: str) -> None:
    """Four final layers by their names, without the variance; N from the arguments, else by option."""
    save_teacher(tmp_path / "teacher", tiny_teacher(channels=2, learn_sigma=True), Diffusion())
    released = _released(tiny_teacher(channels=2, learn_sigma=True))
    weights, other = released.state_dict(), {"x": torch.zeros(1)}
    options: dict[str, Any] = {"teacher": tmp_path / "teacher"}
    if form == "raw":
        content: dict[str, Any] = weights
        options["history_layers"] = 1
    else:
        content = {"opt": {}, "args": argparse.Namespace(stack=1, model="DiT-XL/2"), "model": weights}
        content |= {"ema": weights, "model": other} if form == "ema" else {}
    torch.save(content, tmp_path / "r.pt")
    convert(ConvertConfig(tmp_path / "r.pt", tmp_path / "student", **options))

    student, trained = load_student(tmp_path / "student")
    assert (student.steps, student.history_layers, student.mask) == (4, 1, "causal")
    assert trained["teacher"] == sha256(tmp_path / "teacher" / "model.safetensors")
    assert (trained["grid"], trained["state"]) == ([25, 15, 10, 5, 0], "x0")
    states, labels = torch.randn(3, 4, 2, 28, 28), torch.tensor([0, 4, 9])
    assert _relative(student(states, labels), _plain_student(released, states, labels, 1)) < 1e-5
    assert _relative(student(states, labels), _plain_student(released, states, labels, 2)) > 1e-3

    # Back: what that code reads of a final layer is the same, and it finds all of its tensors.
    convert(ConvertConfig(tmp_path / "student", tmp_path / "back.pt", to="released"))
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    again = _released(tiny_teacher(9, channels=2, learn_sigma=True))
    again.load_state_dict(back["ema"])
    assert torch.equal(_plain_student(again, states, labels, 1), _plain_student(released, states, labels, 1))
    assert back["args"]["stack"] == 1
    assert back["model"].keys() == weights.keys()


def test_the_preset_of_a_released_student(tmp_path: Path) -> None:
    released = _released(DiT.from_preset("DiT-S/8", 16, num_classes=5))
    torch.save({"ema": released.state_dict()}, tmp_path / "r.pt")
    convert(ConvertConfig(tmp_path / "r.pt", tmp_path / "s", preset="DiT-S/8", input_size=16, num_classes=5))
    student, trained = load_student(tmp_path / "s")
    assert (student.history_layers, student.depth, trained["teacher"]) == (6, 12, None)


@pytest.mark.parametrize(
    ("steps", "options"),
    [(4, {}), (1, {}), (3, {"history_layers": 0, "mask": "window"}),
     (2, {"teacher": {"learn_sigma": True, "channels": 3}})],
)  # fmt: skip
def test_a_student_goes_to_the_released_layout_and_back(tmp_path: Path, steps: int, options: Any) -> None:
    """Every bit, and all that the layout itself does not say."""
    source = _student(tmp_path / "s", steps, **options)
    convert(ConvertConfig(source, tmp_path / "r.pt", to="released"))
    convert(ConvertConfig(tmp_path / "r.pt", tmp_path / "back"))
    assert _same_folder(tmp_path / "back", source)


def test_one_final_layer_is_a_teacher_unless_it_is_called_a_student(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    save_teacher(teacher, tiny_teacher(learn_sigma=True), Diffusion())
    convert(ConvertConfig(teacher, tmp_path / "one.pt", to="released"))
    convert(ConvertConfig(tmp_path / "one.pt", tmp_path / "t", teacher=teacher))
    convert(
        ConvertConfig(
            tmp_path / "one.pt", tmp_path / "s", teacher=teacher, layout="released", history_layers=1
        )
    )
    assert _same_folder(tmp_path / "t", teacher)
    assert load_student(tmp_path / "s")[0].steps == 1


@torch.no_grad()
def test_a_shared_final_layer_is_written_for_every_step(tmp_path: Path) -> None:
    source = _student(tmp_path / "s", per_step_final=False)
    convert(ConvertConfig(source, tmp_path / "r.pt", to="released"))
    convert(ConvertConfig(tmp_path / "r.pt", tmp_path / "back"))
    (one, _), (other, _) = load_student(source), load_student(tmp_path / "back")
    assert len(other.final_layers) == 4
    noise, labels = torch.randn(2, 1, 28, 28), torch.tensor([1, 2])
    assert torch.equal(sample(one, noise, labels), sample(other, noise, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mask": "anchor"}, "mask is 'anchor'"), ({"times": [9.0, 5.0, 3.0, 1.0]}, r"times is \[9.0"),
     ({"teacher": {"null_class": False}}, "null_class is False"),
     ({"teacher": {"time_frequencies": "diffusers"}}, "time_frequencies is 'diffusers'")],
)  # fmt: skip
def test_a_student_that_the_released_code_cannot_run_is_refused(
    tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message + ".*, the released code can only hold"):
        convert(ConvertConfig(_student(tmp_path / "s", **options), tmp_path / "r.pt", to="released"))
    assert not (tmp_path / "r.pt").exists()


# diffusers


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-6])
@pytest.mark.parametrize("learn_sigma", [True, False])
@torch.no_grad()
def test_a_diffusers_dit_predicts_here_what_it_predicts_there(
    tmp_path: Path, norm_eps: float, learn_sigma: bool
) -> None:
    theirs = _theirs(norm_eps=norm_eps, out_channels=8 if learn_sigma else None)
    theirs.save_pretrained(tmp_path / "d")
    convert(ConvertConfig(tmp_path / "d", tmp_path / "t", prediction="v"))
    ours, diffusion = load_teacher(tmp_path / "t")
    assert diffusion.prediction == "v"
    x, labels = torch.randn(4, 4, 8, 8), torch.tensor([0, 3, 9, 10])
    t = torch.tensor([0, 41, 500, 999])
    assert _relative(ours(x, t, labels), theirs(x, t, labels).sample) < 1e-5

    convert(ConvertConfig(tmp_path / "d", tmp_path / "public", time_frequencies="dit"))
    other, _ = load_teacher(tmp_path / "public")
    assert _relative(other(x, t, labels), theirs(x, t, labels).sample) > 1e-3, "the test would not see it"


@torch.no_grad()
def test_a_teacher_predicts_in_diffusers_what_it_predicts_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for frequencies, note in (("diffusers", False), ("dit", True)):
        ours = tiny_teacher(2, time_frequencies=frequencies)
        save_teacher(tmp_path / frequencies, ours, Diffusion())
        convert(ConvertConfig(tmp_path / frequencies, tmp_path / "d", to="diffusers"))
        assert ("note: diffusers' DiT embeds the time" in capsys.readouterr().out) == note
        theirs, info = DiTTransformer2DModel.from_pretrained(tmp_path / "d", output_loading_info=True)
        assert not any(info.values()), info
        x, t, labels = torch.randn(2, 1, 28, 28), torch.tensor([20, 700]), torch.tensor([10, 3])
        error = _relative(theirs.eval()(x, t, labels).sample, ours(x, t, labels))
        assert (error > 1e-3) if note else (error < 1e-5)


@pytest.mark.parametrize("frequencies", ["dit", "diffusers"])
def test_a_teacher_goes_to_diffusers_and_back(tmp_path: Path, frequencies: Any) -> None:
    """Every bit; noise schedule and time frequencies, which diffusers' config has no place for, too."""
    source = tmp_path / "t"
    save_teacher(
        source, tiny_teacher(4, learn_sigma=True, time_frequencies=frequencies), Diffusion("cosine", "x0")
    )
    convert(ConvertConfig(source, tmp_path / "d", to="diffusers"))
    convert(ConvertConfig(tmp_path / "d", tmp_path / "back"))
    assert _same_folder(tmp_path / "back", source)


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_diffusers_dit_comes_here_and_goes_back(tmp_path: Path, safetensors: bool) -> None:
    theirs = _theirs()
    theirs.save_pretrained(tmp_path / "d", safe_serialization=safetensors)
    convert(ConvertConfig(tmp_path / "d", tmp_path / "t"))
    convert(ConvertConfig(tmp_path / "t", tmp_path / "back", to="diffusers"))
    before, after = theirs.state_dict(), load_file(tmp_path / "back" / _WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (read_json(tmp_path / folder / "config.json") for folder in ("d", "back"))
    assert {**old, **new, "norm_eps": None} == {**old, "norm_eps": None}


def test_embedders_that_differ_between_blocks_are_refused(tmp_path: Path) -> None:
    theirs = _theirs()
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[3, 5] += 1e-3
    theirs.save_pretrained(tmp_path / "d")
    name = "norm1.emb.class_embedder.embedding_table.weight"
    message = f"transformer_blocks.2.{name} differs from transformer_blocks.0.{name}: the embedders"
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(ConvertConfig(tmp_path / "d", tmp_path / "t"))
    assert not (tmp_path / "t").exists()


def test_diffusers_weights_that_do_not_fit_are_listed_by_their_names(tmp_path: Path) -> None:
    _theirs().save_pretrained(tmp_path / "d")
    tensors = load_file(tmp_path / "d" / _WEIGHTS)
    for i in range(3):
        del tensors[f"transformer_blocks.{i}.attn1.to_q.bias"]
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "d" / _WEIGHTS)
    with pytest.raises(ValueError, match=r"missing transformer_blocks\.\{0\.\.2\}\.attn1\.to_q\.bias; "
                       "unexpected extra$"):  # fmt: skip
        convert(ConvertConfig(tmp_path / "d", tmp_path / "t"))
    assert not (tmp_path / "t").exists()


def test_released_weights_that_do_not_fit_are_listed_by_their_names(tmp_path: Path, teacher: Path) -> None:
    weights = _released(tiny_teacher(learn_sigma=True)).state_dict()
    del weights["final_layer3.linear.bias"]
    torch.save({"model": {**weights, "ema_decay": torch.zeros(1)}}, tmp_path / "r.pt")
    options: dict[str, Any] = {"teacher": teacher, "history_layers": 1}
    with pytest.raises(ValueError, match=r"missing final_layer3\.linear\.bias; unexpected ema_decay$"):
        convert(ConvertConfig(tmp_path / "r.pt", tmp_path / "s", **options))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [("_class_name", "UNet2DModel", "_class_name is 'UNet2DModel', accepted are 'DiTTransformer2DModel'"),
     ("norm_type", "layer_norm", "norm_type is 'layer_norm', accepted are 'ada_norm_zero'"),
     ("activation_fn", "geglu", "activation_fn is 'geglu'"),
     ("attention_bias", False, "attention_bias is False"), ("norm_eps", 1e-3, r"norm_eps is 0\.001"),
     ("out_channels", 5, "out_channels is 5, accepted are in_channels"),
     ("sample_size", None, "input_size is None, accepted is"), ("num_layers", "x", "depth is 'x', accepted"),
     ("num_layers", 2, r"unexpected transformer_blocks\.2\.")],
)  # fmt: skip
def test_a_diffusers_config_that_our_dit_cannot_be_is_refused(
    tmp_path: Path, setting: str, value: Any, message: str
) -> None:
    _theirs().save_pretrained(tmp_path / "d")
    write_json(tmp_path / "d/config.json", {**read_json(tmp_path / "d/config.json"), setting: value})
    with pytest.raises(ValueError, match=message):
        convert(ConvertConfig(tmp_path / "d", tmp_path / "t"))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"input_size": (28, 14)}, r"input_size is \(28, 14\)"), ({"null_class": False}, "null_class is False"),
     ({"mlp_ratio": 2.0}, r"mlp_ratio is 2\.0"), ({}, "the position embedding is")],
)  # fmt: skip
def test_a_teacher_that_diffusers_has_no_place_for_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    ours = tiny_teacher(**options)
    if not options:
        with torch.no_grad():
            ours.pos_embed[0, 3, 4] += 1e-3
    save_teacher(tmp_path / "t", ours, Diffusion())
    with pytest.raises(ValueError, match=message + ".*, diffusers' DiT can only hold"):
        convert(ConvertConfig(tmp_path / "t", tmp_path / "d", to="diffusers"))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "ours", ["{", "3", '{"diffusion": 3}', '{"diffusion": {"x": 1}}', '{"diffusion": {"schedule": "x"}}']
)
def test_metadata_that_describes_nothing_is_refused(tmp_path: Path, ours: str) -> None:
    _theirs().save_pretrained(tmp_path / "d")
    save_file(load_file(tmp_path / "d" / _WEIGHTS), tmp_path / "d" / _WEIGHTS, {"format": "pt", "ard": ours})
    with pytest.raises(ValueError, match=r"does not describe a teacher|schedule is 'x'"):
        convert(ConvertConfig(tmp_path / "d", tmp_path / "t"))


@pytest.mark.parametrize(
    "ours",
    [3, "{", "[]", "{}", '{"config": {}, "trajectories": 3}',
     json.dumps({"config": {"teacher": TINY, "x": 1}, "trajectories": {}})],
)  # fmt: skip
def test_arguments_that_describe_nothing_are_refused(tmp_path: Path, ours: Any) -> None:
    torch.save({"model": {"x": torch.zeros(1)}, "args": {"ard": ours}}, tmp_path / "r.pt")
    with pytest.raises(ValueError, match=r"r\.pt: does not describe a student"):
        convert(ConvertConfig(tmp_path / "r.pt", tmp_path / "s"))


def test_a_folder_of_nothing_is_refused(tmp_path: Path, student: Path, teacher: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json there.*transformer folder of a diffusers"):
        convert(ConvertConfig(tmp_path, tmp_path / "out"))
    write_json(tmp_path / "d" / "config.json", {"_class_name": "DiTTransformer2DModel"})
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors or"):
        convert(ConvertConfig(tmp_path / "d", tmp_path / "out"))
    torch.save({}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds an ARDTransformer, wanted is a DiT"):
        convert(ConvertConfig(tmp_path / "x.pt", tmp_path / "out", teacher=student))


def _tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("out", ["models", ".", "models/DiT.pt"])
@pytest.mark.parametrize("to", ["ard", "diffusers", "released"])
def test_what_is_not_a_conversion_is_not_replaced(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, out: str, to: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(ConvertConfig(teacher, Path("models/DiT.pt"), to="released"))
    (tmp_path / "models" / "thesis.txt").write_text("years of work")
    before = _tree(tmp_path)
    with pytest.raises(ValueError, match=f"^convert: out is {re.escape(out)}, where the weights are"):
        convert(ConvertConfig(Path("models/DiT.pt"), Path(out), to, teacher=teacher))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.txt").write_text("years of work")
    if to != "released":
        with pytest.raises(ValueError, match="out is elsewhere, which holds thesis"):
            convert(ConvertConfig(Path("models/DiT.pt"), Path("elsewhere"), to, teacher=teacher))
    for name in ("elsewhere/thesis.txt", "elsewhere/thesis.txt/within"):
        refused = "the name of a .pt file" if to == "released" else "elsewhere/thesis.txt is in the way"
        with pytest.raises(ValueError, match=f"^convert: out is {name}, .*{refused}"):
            convert(ConvertConfig(Path("models/DiT.pt"), Path(name), to, teacher=teacher))
    assert _tree(tmp_path) == {**before, tmp_path / "elsewhere" / "thesis.txt": b"years of work"}


def test_a_file_is_written_where_nothing_is_and_can_be_read(tmp_path: Path, teacher: Path) -> None:
    file, folder = tmp_path / "there.pt", tmp_path / "folder.pt"
    file.write_text("years of work")
    folder.mkdir()
    for out in (file, folder, file / "within.pt"):
        message = f"out is {out}, but {folder if out == folder else file} is in the way; remove it, or name"
        with pytest.raises(ValueError, match=re.escape(message)):
            convert(ConvertConfig(teacher, out, to="released"))
    for name in ("x", "x.safetensors", "x.pt.txt"):
        with pytest.raises(ValueError, match=f"{name}, accepted with --to released is the name of a .pt"):
            convert(ConvertConfig(teacher, tmp_path / name, to="released"))
    assert _tree(tmp_path) == {file: b"years of work"}


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [("teacher", {"prediction": "x0", "noise_schedule": "cosine", "teacher": Path("nowhere")},
      "noise_schedule is cosine, prediction is x0, teacher is nowhere, but teacher describes itself; leave"),
     ("teacher", {"weights_key": "ema"}, "weights_key is ema, but teacher describes itself"),
     ("teacher", {"time_frequencies": "diffusers"}, "time_frequencies is diffusers, but teacher describes"),
     ("student", {"history_layers": 3, "layout": "dit", "preset": "DiT-S/2"},
      "preset is DiT-S/2, layout is dit, history_layers is 3, but student describes itself"),
     ("student.pt", {"layout": "dit"}, r"layout is dit, but student\.pt holds a student and describes it"),
     ("diffusers", {"input_size": 8, "teacher": Path("teacher")},
      "input_size is 8, teacher is teacher, but diffusers is a folder of diffusers, which"),
     ("diffusers", {"noise_schedule": "flow-to-data", "time_scale": 1.0},
      "noise_schedule is flow-to-data, time_scale is 1.0, but .* records what it was trained with"),
     ("teacher.pt", {"teacher": Path("teacher"), "prediction": "x0", "num_classes": 5},
      "num_classes is 5, prediction is x0, but teacher is teacher, which says that"),
     ("teacher.pt", {"teacher": Path("teacher"), "history_layers": 0},
      r"history_layers is 0, but teacher\.pt holds a teacher"),
     ("teacher.pt", {"time_frequencies": "dit"},
      r"time_frequencies is dit, but teacher\.pt is not a folder of diffusers")],
)  # fmt: skip
def test_what_the_source_says_is_not_an_option(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, weights: str, options: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(ConvertConfig(teacher, Path("teacher")))
    convert(ConvertConfig(teacher, Path("teacher.pt"), to="released"))
    convert(ConvertConfig(teacher, Path("diffusers"), to="diffusers"))
    convert(ConvertConfig(_student(Path("student")), Path("student.pt"), to="released"))
    with pytest.raises(ValueError, match=f"^convert: {message}"):
        convert(ConvertConfig(Path(weights), Path("out"), **options))
    assert not Path("out").exists()


def test_an_earlier_conversion_is_replaced(tmp_path: Path, teacher: Path, student: Path) -> None:
    for source in (teacher, student, teacher):
        convert(ConvertConfig(source, tmp_path / "ours"))
        assert _same_folder(tmp_path / "ours", source)
        convert(ConvertConfig(source, tmp_path / "theirs", to="diffusers"))
        assert (tmp_path / "theirs" / "model_index.json").exists() == (source == student)
    assert not [*tmp_path.rglob("*.tmp")]


def test_folders_of_ours_are_copied(tmp_path: Path, student: Path, teacher: Path) -> None:
    for folder in (student, teacher):
        convert(ConvertConfig(folder, tmp_path / "copy"))
        assert _same_folder(tmp_path / "copy", folder)
