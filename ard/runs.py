"""The folder of a run: its configuration, its log, its checkpoints. Starting a run again continues it."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ard.checkpoints import (
    describing,
    read_json,
    read_tensors,
    remove,
    replacing,
    sha256,
    write_json,
    write_tensors,
)
from ard.checks import check_local
from ard.finite import check_finite
from ard.locks import acquire, release
from ard_kernels.machine import cpu_name, git


def versions() -> dict[str, str]:
    """What a result depends on."""
    try:
        own = version("ard")
    except PackageNotFoundError:
        own = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return {
        "ard": own, "commit": commit or "no repository", "torch": torch.__version__,
        "python": platform.python_version(), "device": device, "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def plain(config: Any) -> Any:
    """A configuration dataclass as JSON values."""
    return _json(dataclasses.asdict(config))


def _json(values: dict[str, Any]) -> Any:
    return json.loads(json.dumps(values, default=str))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's log."""
    path = folder / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of a run's checkpoints, the newest last."""
    found = (re.fullmatch(r"step-(\d{8})", path.name) for path in (folder / "checkpoints").glob("step-*"))
    return sorted((int(m[1]), folder / "checkpoints" / m[0]) for m in found if m)


def newest_checkpoint(folder: Path) -> tuple[int, dict[str, dict[str, Tensor]]] | None:
    """Step and groups of tensors of a run's newest checkpoint; None if it has none. One that is damaged or
    not finite is an error."""
    if not (found := checkpoints(folder)):
        return None
    step, path = found[-1]
    with describing(path / "state.json", "checkpoint"):
        checksums = read_json(path / "state.json")["sha256"].items()
    groups = {}
    for name, checksum in checksums:
        file = path / f"{name}.safetensors"
        if not file.is_file() or sha256(file) != checksum:
            raise ValueError(
                f"{file}: does not match its checksum; remove {path} to go on from an earlier one"
            )
        groups[name] = read_tensors(file)
        check_finite(file, groups[name], f"remove {path} to go on from an earlier one")
    return step, groups


def begun(folder: Path, config: Any, option: str) -> Any:
    """An option of the run that a folder holds, as `config` has it; None where there is no run."""
    path = folder / "run.json"
    if not path.exists():
        return None
    with describing(path, "run"):
        return {**_absent(config), **_options(read_json(path)["config"])}[option]


def found(folder: Path, name: str) -> Any:
    """What the run in a folder found out as it began, such as its "states"; None where it did not."""
    path = folder / "run.json"
    if not path.exists():
        return None
    with describing(path, "run"):
        return read_json(path).get(name)


def _absent(config: Any) -> dict[str, Any]:
    """What a run did whose run.json lacks an option, by the option's name.

    An option is added with a default that leaves runs as they were, which is its value here. One whose
    default is another, or changes later, says so in its field: ``metadata={"absent": value}``.
    """
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, f.name)):
            flat.update(_absent(value))
        elif "absent" in f.metadata:
            flat[f.name] = f.metadata["absent"]
        elif f.default is not dataclasses.MISSING:
            flat[f.name] = f.default
    absent: dict[str, Any] = _json(flat)
    return absent


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a configuration as the command line has them, without what groups them."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat.update(_options(value) if isinstance(value, dict) else {name: value})
    return flat


def _may_change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a run may go on with another value: what it computes is the same but for rounding, or the same
    and then more."""
    if name == "iterations" and old.get("lr_schedule") == "constant":
        return bool(old[name] < new[name])
    if name == "accumulate":
        return "gan_weight" not in old  # of whose losses each is one of its own pass
    return name in (
        "out", "log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "checkpointing",
        "compile", "max_skipped",
    )  # fmt: skip


class Run:
    """A run folder.

    Args:
        folder: made if it is not there. One that holds a run with another configuration is an error, except
            for what makes no difference to the result (where things lie, how often it logs, saves and shows,
            how a batch is divided), and more iterations at a constant learning rate. An option that its
            run.json lacks had the default of its time, see `_absent`.
        command: the command's name.
        config: its configuration dataclass.
        main: whether this process writes (rank 0).
        inputs: sha256 of what lies at an option that is a path, by the option's name; it may be moved.
        precision: what was asked for, what that came to and why, as the run began.
        states: which states its student steps over, see `found`.

    Until it is closed no other process can open it.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        config: Any,
        main: bool = True,
        inputs: Mapping[str, str] | None = None,
        precision: Mapping[str, str] | None = None,
        states: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.main = folder, main
        self._log: Any = None
        self._board: SummaryWriter | None = None
        check_local(command, "out", folder)
        if main:
            acquire(folder)
        try:
            self._begin(command, config, inputs, {"precision": precision, "states": states})
        except BaseException:
            self.close()
            raise

    def _begin(
        self,
        command: str,
        config: Any,
        inputs: Mapping[str, str] | None,
        begins: Mapping[str, Any],
    ) -> None:
        folder, main = self.folder, self.main
        contents = {name: f"sha256:{value}" for name, value in (inputs or {}).items()}
        wanted = {"command": command, "config": plain(config), "inputs": contents}
        path = folder / "run.json"
        if path.exists():
            with describing(path, "run"):
                found = read_json(path)
                if found["command"] != command:
                    raise ValueError(
                        f"{folder}: holds a run of `ard {found['command']}`, not of `ard {command}`"
                    )
                old, new = ({**_options(r["config"]), **r.get("inputs", {})} for r in (found, wanted))
                old = {**_absent(config), **old}
                changed = [n for n in sorted(set(new) | set(old)) if old.get(n) != new.get(n)]
                refused = [n for n in changed if not _may_change(n, old, new)]
            if refused:
                listed = "; ".join(f"{n} was {old.get(n)!r}, is {new.get(n)!r}" for n in refused)
                raise ValueError(f"{folder}: holds a run with another configuration ({listed}); "
                                 "name another folder with --out, or remove this one")  # fmt: skip
            if changed and main:
                write_json(path, {**found, **wanted})
        elif main:
            known = {name: value for name, value in begins.items() if value is not None}
            write_json(path, {**wanted, **known, "versions": versions()})

    def save_checkpoint(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], keep: int) -> None:
        """Every group of tensors in a file of its own, in a folder that appears complete or not at all."""
        with replacing(self.folder / "checkpoints" / f"step-{step:08d}") as temporary:
            temporary.mkdir()
            for name, tensors in groups.items():
                write_tensors(temporary / f"{name}.safetensors", tensors)
            checksums = {name: sha256(temporary / f"{name}.safetensors") for name in groups}
            write_json(temporary / "state.json", {"step": step, "sha256": checksums})
        for _, path in checkpoints(self.folder)[:-keep]:
            remove(path)

    def open_log(self, step: int) -> None:
        """Logs start after `step`: what a killed run logged beyond its last checkpoint, or left half
        written, goes."""
        if not self.main:
            return
        for remains in self.folder.rglob(".*.tmp"):  # see `replacing`
            remove(remains)
        path = self.folder / "log.jsonl"
        with describing(path, "run"):
            kept = [line for line in read_log(self.folder) if line["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._log = path.open("a")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float | list[float]]) -> None:
        """One line of the log, with null for a value that is not finite; TensorBoard gets lists as one curve
        per element."""
        if self._log is None or self._board is None:
            return
        line: dict[str, Any] = {"step": step}
        for name, value in values.items():
            curves = {name: value} if isinstance(value, float | int) else {
                f"{name}/{i}": number for i, number in enumerate(value)
            }  # fmt: skip
            finite = [number if math.isfinite(number) else None for number in curves.values()]
            line[name] = finite[0] if isinstance(value, float | int) else finite
            for curve, number in zip(curves, finite, strict=True):
                if number is not None:
                    self._board.add_scalar(curve, number, step)
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    def log_image(self, step: int, name: str, image: Tensor) -> None:
        """image (h, w) or (h, w, 3) uint8, to TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HW" if image.dim() == 2 else "HWC")

    def close(self) -> None:
        """Close the logs, and let other processes use the folder."""
        if self.main:
            release(self.folder)
        if self._log is not None and self._board is not None:
            self._log.close()
            self._board.close()
