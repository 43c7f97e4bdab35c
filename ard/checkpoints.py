"""Weights and small files on disk: written under a temporary name and renamed, read without executing
anything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ard.diffusion import Diffusion
from ard.models import ARDTransformer, DiT

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends, or vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors as safetensors; what two names share is stored twice."""
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from None
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # like any other file; safetensors makes files for the owner alone


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt/.pth/.ckpt file as far as it holds nothing but data.

    A checkpoint that keeps its weights under "ema", "model" or "state_dict" gives those (in this order).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a stranger's bytes make an unpickler do
        # torch's own advice, to load it with its code after all, is left out.
        found = re.search(r"WeightsUnpickler error: (Unsupported \w+: )?(.*?)(\. |\n|$)", str(error))
        reason = (found[2] if found else str(error).partition("\n")[0]) or type(error).__name__
        raise ValueError(f"{path}: refused, it is not a file of plain tensors ({reason[:160]})") from None
    for key in ("ema", "model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"{path}: accepted is a mapping of names to tensors")
    return loaded


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Strict: a missing, unexpected or misshapen tensor is named, and then nothing is loaded."""
    own = module.state_dict()
    complaints = [f"missing {name}" for name in own if name not in tensors]
    complaints += [f"unexpected {name}" for name in tensors if name not in own]
    complaints += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model wants {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if complaints:
        more = f" and {len(complaints) - 4} more" if len(complaints) > 4 else ""
        raise ValueError(f"{source}: does not fit the model: {'; '.join(complaints[:4])}{more}")
    module.load_state_dict(dict(tensors))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(folder: Path, description: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    with replacing(folder) as temporary:
        temporary.mkdir()
        write_tensors(temporary / WEIGHTS, tensors)
        write_json(temporary / CONFIG, description)


def save_teacher(
    folder: Path, model: DiT, diffusion: Diffusion, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """A folder with config.json and model.safetensors; `tensors` instead of the model's own weights (an
    EMA)."""
    description = {"class": "DiT", "config": model.config, "diffusion": diffusion.config}
    _save(folder, description, model.state_dict() if tensors is None else tensors)


def save_student(
    folder: Path,
    model: ARDTransformer,
    trajectories: dict[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Like `save_teacher`; `trajectories` records what the student was trained on."""
    description = {"class": "ARDTransformer", "config": model.config, "trajectories": trajectories}
    _save(folder, description, model.state_dict() if tensors is None else tensors)


@contextlib.contextmanager
def _described(folder: Path, wanted: str) -> Iterator[dict[str, Any]]:
    """The description in a folder; one that does not describe a model is an error in the block, too."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG} there; accepted is a folder written by this project")
    description = read_json(folder / CONFIG)
    found = description.get("class") if isinstance(description, dict) else None
    if found != wanted:
        raise ValueError(f"{folder / CONFIG}: holds a {found}, wanted is a {wanted}")
    try:
        yield description
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG}: does not describe a {wanted} ({error})") from None


def load_teacher(folder: Path) -> tuple[DiT, Diffusion]:
    """The DiT of a folder, in evaluation mode and without gradients, and its noise schedule."""
    with _described(folder, "DiT") as description:
        model, diffusion = DiT(**description["config"]), Diffusion(**description["diffusion"])
    load_weights(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model.eval().requires_grad_(False), diffusion


def load_student(folder: Path) -> tuple[ARDTransformer, dict[str, Any]]:
    """The student of a folder, in evaluation mode and without gradients, and what it was trained on."""
    with _described(folder, "ARDTransformer") as description:
        model, trajectories = ARDTransformer(**description["config"]), description["trajectories"]
    load_weights(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model.eval().requires_grad_(False), trajectories
