"""Weights and small files on disk: written under a temporary name and renamed, read without executing
anything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ard.checks import check_local
from ard.diffusion import Diffusion
from ard.finite import check_finite
from ard.models import ARDTransformer, DiT

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends, or vanishes when it fails.

    A folder takes the place of one that is there, with all that is in it.
    """
    check_local("write", "path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process ids repeat on machines that share a disk.
    temporary, old = (path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp") for _ in range(2))
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            os.replace(path, old)  # and not removed before the new one is there
        os.replace(temporary, path)
        remove(old)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """A file or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


@contextlib.contextmanager
def describing(source: object, what: str) -> Iterator[None]:
    """What a stranger's description can do to the code that reads it, as one clear error."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{source}: does not describe {_a(what)} ({reason})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors as safetensors; what two names share is stored twice. One that is not finite is an error."""
    check_finite(path, tensors, "nothing was written")
    with replacing(path) as temporary:
        # One copy each, on the host: what shares memory is refused.
        contiguous = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from None
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # like any other file; safetensors makes files for the owner alone


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; nothing for a file of another kind."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, under any name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None


# A DiT of any depth has 22 names once layers are counted together: a list of everything that differs in any
# one way stays below this. It bounds what a file of a million names does to the message.
_LISTED = 100


def together(names: Iterable[str]) -> str:
    """Names, those that differ in their first number as one: blocks.{0..11}.attn.qkv.weight."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = re.fullmatch(r"(|.*?\.)(\d{1,6})(|\..*)", name, re.DOTALL)
        before, number, after = found.groups() if found else (name, "", "")
        groups.setdefault((before, after), []).append(number)
    listed = []
    for (before, after), numbers in list(groups.items())[:_LISTED]:
        shown = numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}"
        if len(numbers) > 2 and numbers == [str(int(numbers[0]) + i) for i in range(len(numbers))]:
            shown = f"{{{numbers[0]}..{numbers[-1]}}}"
        listed.append(f"{before}{shown}{after}")
    more = f" and {len(groups) - _LISTED} more" if len(groups) > _LISTED else ""
    return ", ".join(listed) + more


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """A .pt file, for code that does not read safetensors. `content`: plain data, tensors, and mappings of
    names to tensors. One that is not finite is an error."""
    for value in (content, *content.values()):
        if isinstance(value, Mapping):
            tensors = {name: x for name, x in value.items() if isinstance(x, Tensor)}
            check_finite(path, tensors, "nothing was written")
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            raise OSError(f"{path}: could not be written ({error})") from None


class MisfitError(ValueError):
    """Tensors that do not fit a model: `own`, those that it wants, against `found`, those that are given."""

    def __init__(self, message: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        super().__init__(message)
        self.own, self.found = own, found


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object) -> None:
    """MisfitError that lists every tensor that `tensors` lacks, has too many, or has in another shape than
    `own`."""
    complaints = []
    if missing := [name for name in own if name not in tensors]:
        complaints.append(f"missing {together(missing)}")
    if unexpected := [name for name in tensors if name not in own]:
        complaints.append(f"unexpected {together(unexpected)}")
    shapes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name in own:
        if name in tensors and tensors[name].shape != own[name].shape:
            shapes.setdefault((tuple(tensors[name].shape), tuple(own[name].shape)), []).append(name)
    for (found, wanted), names in shapes.items():
        have = "have" if len(names) > 1 else "has"
        complaints.append(f"{together(names)} {have} shape {found}, the model wants {wanted}")
    if complaints:
        raise MisfitError(f"{source}: does not fit the model: {'; '.join(complaints)}", own, tensors)


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Strict: all missing, unexpected and misshapen tensors are named, or those that are not finite, and then
    nothing is loaded."""
    check_fit(module.state_dict(), tensors, source)
    check_finite(source, tensors, "accepted are finite weights")
    module.load_state_dict(dict(tensors))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_readable(
    model: DiT | ARDTransformer, known: type[nn.Module], tensors: Mapping[str, Tensor]
) -> None:
    """A folder is read back as the class of the name in it, `known`: what would not fit then is an error."""
    if type(model) is not known:
        raise ValueError(
            f"save: the model is a {type(model).__name__} ({type(model).__module__}), accepted is what would "
            f"be loaded, {known.__name__} ({known.__module__})"
        )
    with torch.device("meta"):
        check_fit(known(**model.config).state_dict(), tensors, "save")


def _write(folder: Path, description: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, description)


def write_teacher(
    folder: Path, model: DiT, diffusion: Diffusion, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """config.json and model.safetensors in a folder, whatever else is there; `tensors` instead of the model's
    own weights (an EMA)."""
    tensors = model.state_dict() if tensors is None else tensors
    name = type(model).__name__
    _check_readable(model, DiT.classes[name], tensors)
    _write(folder, {"class": name, "config": model.config, "diffusion": diffusion.config}, tensors)


def write_student(
    folder: Path,
    model: ARDTransformer,
    trajectories: dict[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Like `write_teacher`; `trajectories` records what the student was trained on."""
    tensors = model.state_dict() if tensors is None else tensors
    _check_readable(model, ARDTransformer, tensors)
    description = {"class": "ARDTransformer", "config": model.config, "trajectories": trajectories}
    _write(folder, description, tensors)


def save_teacher(
    folder: Path, model: DiT, diffusion: Diffusion, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """A folder of what `write_teacher` writes and nothing else: it appears whole or not at all."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        write_teacher(temporary, model, diffusion, tensors)


def save_student(
    folder: Path,
    model: ARDTransformer,
    trajectories: dict[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """A folder of what `write_student` writes and nothing else: it appears whole or not at all."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        write_student(temporary, model, trajectories, tensors)


@contextlib.contextmanager
def described(folder: Path, accepted: Container[str], wanted: str) -> Iterator[dict[str, Any]]:
    """The description in a folder, of a class that is accepted; one that does not describe a model is an
    error in the block, too."""
    check_local("load", "folder", folder)
    if not (folder / CONFIG).is_file():
        within = [name for name in ("student", "teacher") if (folder / name / CONFIG).is_file()]
        raise FileNotFoundError(
            f"{folder}: no {CONFIG} there; accepted is "
            + (" or ".join(str(folder / n) for n in within) or "a folder written by this project")
        )
    description = read_json(folder / CONFIG)
    found = description.get("class") if isinstance(description, dict) else None
    if not isinstance(found, str) or found not in accepted:
        holds = _a(found) if isinstance(found, str) and found else "no model"
        raise ValueError(f"{folder / CONFIG}: holds {holds}, wanted is {_a(wanted)}")
    with describing(folder / CONFIG, found):
        yield description


def load_teacher(folder: Path | str) -> tuple[DiT, Diffusion]:
    """The DiT of a folder, in evaluation mode and without gradients, and its noise schedule."""
    folder = Path(folder)
    known = "DiT, or a subclass whose module has been imported"
    with described(folder, DiT.classes, known) as description:
        model = DiT.classes[description["class"]](**description["config"])
        diffusion = Diffusion(**description["diffusion"])
    load_weights(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    model.diffusion = diffusion
    return model.eval().requires_grad_(False), diffusion


def load_student(folder: Path | str) -> tuple[ARDTransformer, dict[str, Any]]:
    """The student of a folder, in evaluation mode and without gradients, and what it was trained on."""
    folder = Path(folder)
    with described(folder, ["ARDTransformer"], "ARDTransformer") as description:
        model, trajectories = ARDTransformer(**description["config"]), {**description["trajectories"]}
    load_weights(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    model.trajectories = trajectories
    return model.eval().requires_grad_(False), trajectories
