"""The command line: a mistake is one line and a non-zero exit, and nothing is left half written."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ard import cli, sampling
from ard.checkpoints import load_student, load_teacher
from ard.checks import check_local
from ard.cli import main, parse
from ard.distilling import DistillConfig, distill
from ard.features import Statistics
from ard.models import ARDTransformer
from ard.recording import RecordConfig, record
from ard.trajectories import TrajectoryStore

_COMMANDS = (
    "demo", "train-teacher", "record", "encode", "distill", "finetune", "sample", "evaluate", "diagnose",
    "flops", "convert",
)  # fmt: skip
# "distill:  50%|█████     | 2/4 [00:00<00:00, ...": what tqdm rewrites in place.
_BAR = re.compile(r"^[\w. -]+: +\d+%\|.*$")


def _messages(stderr: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not _BAR.match(line)]


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class Place:
    """A folder of copies that a case may damage; OUT is where the command is told to write."""

    def __init__(self, folder: Path, recording: RecordConfig, student: Path) -> None:
        self.folder, self.out = folder, folder / "OUT"
        self.teacher = Path(shutil.copytree(recording.teacher, folder / "TEACHER"))
        self.store = Path(shutil.copytree(recording.out, folder / "STORE"))
        self.student = Path(shutil.copytree(student, folder / "STUDENT"))

    def expand(self, command: str) -> list[str]:
        names = ("TEACHER", "STORE", "STUDENT", "OUT", "FILE")
        return [str(self.folder / word) if word in names else word for word in command.split()]


@pytest.fixture
def place(tmp_path: Path, recording: RecordConfig, student: Path) -> Place:
    return Place(tmp_path, recording, student)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit(path: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return eval, ("open('/tmp/ard-evil-was-executed', 'w')",)


def _evil_archive(place: Place) -> None:
    torch.save({"pos_embed": torch.zeros(1), "x": _Evil()}, place.folder / "FILE")
    (place.folder / "FILE").rename(place.folder / "evil.pt")


def _evil_pickle(place: Place) -> None:
    (place.folder / "evil.pt").write_bytes(pickle.dumps(_Evil()))


def _idx_folder(place: Place) -> None:
    (place.folder / "FILE").mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (place.folder / "FILE" / f"{name}-ubyte.gz").write_bytes(b"\x1f\x8b\x08 and then nothing")


def _scale(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["final_layer.linear.weight"] *= 1e9
    save_file(tensors, path)


def _wrong_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.attn.qkv.weight"] = tensors["blocks.0.attn.qkv.weight"][:, :-1].contiguous()
    del tensors[
        "final_layer.linear.bias" if "final_layer.linear.bias" in tensors else "final_layers.0.linear.bias"
    ]
    save_file(tensors, path)


def _nothing(_: Place) -> None:
    pass


_RECORD = "record --teacher TEACHER --out OUT --samples 8"
_DISTILL = "distill --teacher TEACHER --trajectories STORE --out OUT --history-layers 2 --iterations 2"
_FINETUNE = "finetune --teacher TEACHER --regression FILE --trajectories STORE --real digits --out OUT"
_DIAGNOSE = "diagnose --students STUDENT --trajectories STORE --out OUT"
_SAMPLE = "sample --student STUDENT --out OUT --samples 4"
_EVALUATE = "evaluate --student STUDENT --trajectories STORE --out OUT"

# name: (what is wrong with the files, the command, a part of the line, files that may be there after it)
_BAD: dict[str, tuple[Callable[[Place], object], str, str, set[str]]] = {
    "record, no teacher": (lambda p: shutil.rmtree(p.teacher), _RECORD, r"TEACHER: no config.json", set()),
    "record, a student for a teacher": (
        _nothing, _RECORD.replace("TEACHER", "STUDENT"), "wanted is a DiT", set()),
    "record, truncated weights": (
        lambda p: _truncate(p.teacher / "model.safetensors"), _RECORD, "not a complete safetensors file",
        set()),
    "record, no weights": (
        lambda p: (p.teacher / "model.safetensors").unlink(), _RECORD, "model.safetensors: no such file",
        set()),
    "record, weights of another shape": (
        lambda p: _wrong_shape(p.teacher), _RECORD,
        r"missing final_layer.linear.bias; .*qkv.weight has shape", set()),
    "record, config that is not JSON": (
        lambda p: _truncate(p.teacher / "config.json"), _RECORD, "config.json: not JSON", set()),
    "record, config of something else": (
        lambda p: _edit(p.teacher / "config.json", lambda c: c.pop("config")), _RECORD,
        "does not describe a DiT", set()),
    "record, config with an unknown option": (
        lambda p: _edit(p.teacher / "config.json", lambda c: c["config"].update(bogus=1)), _RECORD, "bogus",
        set()),
    "record, no samples": (
        _nothing, _RECORD.replace("8", "0"), "samples is 0, accepted is an integer", set()),
    "record, too many solver steps": (
        _nothing, f"{_RECORD} --solver-steps 1001", r"accepted are 1\.\.1000", set()),
    "record, position that is not there": (_nothing, f"{_RECORD} --keep 25", r"positions 1\.\.24", set()),
    "record, another recording": (
        _nothing, _RECORD.replace("OUT", "STORE"), "another recording", set()),
    "record, out is a file": (lambda p: p.out.write_text("x"), _RECORD, "OUT", {""}),
    "distill, no trajectories": (
        lambda p: shutil.rmtree(p.store), _DISTILL, r"no manifest.json there", set()),
    "distill, truncated shard": (
        lambda p: _truncate(p.store / "shard-000000.safetensors"), f"{_DISTILL} --batch-size 44",
        "shard-000000.safetensors: truncated", {"run.json", "log.jsonl", "tensorboard"}),
    "distill, missing shard": (
        lambda p: (p.store / "shard-000001.safetensors").unlink(), _DISTILL, "1 shards are missing", set()),
    "distill, wrong-shape teacher": (
        lambda p: _wrong_shape(p.teacher), _DISTILL, "does not fit the model", set()),
    "distill, another teacher": (
        lambda p: _edit(p.store / "manifest.json", lambda m: m.update(teacher="0")), _DISTILL,
        "another teacher", set()),
    "distill, grid that does not fit S": (
        _nothing, f"{_DISTILL} --steps 2 --grid 25 0", "accepted are 3", set()),
    "distill, grid that was not kept": (
        _nothing, f"{_DISTILL} --steps 2 --grid 25 11 0", r"positions \[11\] were not kept", set()),
    "distill, S that does not divide": (_nothing, f"{_DISTILL} --steps 7", r"accepted are 1\.\.5", set()),
    "distill, S of nothing": (_nothing, f"{_DISTILL} --steps 0", "steps is 0, accepted", set()),
    "distill, N deeper than the model": (
        _nothing, _DISTILL.replace("layers 2", "layers 3"), r"history_layers is 3, accepted are 0\.\.2",
        set()),
    "distill, batch that does not divide": (
        _nothing, f"{_DISTILL} --batch-size 8 --accumulate 3", "batch_size is 8, accepted are multiples",
        set()),
    "distill, no batch": (_nothing, f"{_DISTILL} --batch-size 0", "batch_size is 0, accepted", set()),
    "distill, a share of more than all": (
        _nothing, f"{_DISTILL} --rollout 1.5", r"rollout is 1\.5, accepted is a share", set()),
    "encode, no images": (
        _nothing, "encode --images FILE --vae FILE --out OUT", "FILE", set()),
    "finetune, no regression": (_nothing, _FINETUNE, r"FILE: no config.json there", set()),
    "finetune, no trajectories": (
        lambda p: shutil.rmtree(p.store), _FINETUNE, r"no manifest.json there", set()),
    "finetune, half precision": (
        _nothing, f"{_FINETUNE} --precision fp16", "precision is 'fp16', accepted", set()),
    "finetune, no run of distill": (
        lambda p: shutil.copytree(p.student, p.folder / "FILE" / "student"),
        _FINETUNE, "no checkpoint there; accepted is a run", set()),
    "diagnose, no student": (lambda p: shutil.rmtree(p.student), _DIAGNOSE, "no config.json there", set()),
    "diagnose, truncated shard": (
        lambda p: _truncate(p.store / "shard-000000.safetensors"), _DIAGNOSE,
        "shard-000000.safetensors: trunc", set()),
    "demo, no teacher": (
        lambda p: shutil.rmtree(p.teacher), "demo --teacher TEACHER --out OUT", "TEACHER: no config.json",
        {"run.json"}),
    "sample, no student": (lambda p: shutil.rmtree(p.student), _SAMPLE, "no config.json there", set()),
    "sample, a teacher for a student": (
        _nothing, _SAMPLE.replace("STUDENT", "TEACHER"), "holds a DiT, wanted is an ARDTransformer", set()),
    "sample, wrong-shape student": (
        lambda p: _wrong_shape(p.student), _SAMPLE, "does not fit the model", set()),
    "sample, label too large": (
        _nothing, f"{_SAMPLE} --labels 3 10", r"labels are 3\.\.10, accepted are 0\.\.9", set()),
    "sample, label below zero": (_nothing, f"{_SAMPLE} --labels -1", r"labels are -1\.\.-1", set()),
    "sample, no samples": (_nothing, _SAMPLE.replace("4", "0"), "samples is 0", set()),
    "evaluate, no student": (lambda p: shutil.rmtree(p.student), _EVALUATE, "no config.json there", set()),
    "evaluate, truncated shard": (
        lambda p: _truncate(p.store / "shard-000000.safetensors"), _EVALUATE,
        "shard-000000.safetensors: trunc", set()),
    "evaluate, no such classifier": (_nothing, f"{_EVALUATE} --classifier FILE", "FILE", set()),
    "evaluate, no such inception weights": (
        _nothing, f"{_EVALUATE} --inception FILE", "FILE: no such file", set()),
    "evaluate, no such reference": (_nothing, f"{_EVALUATE} --reference FILE", "FILE: no such file", set()),
    "evaluate, more than there are": (_nothing, f"{_EVALUATE} --samples 45", r"accepted are 4\.\.44", set()),
    "evaluate, a store of another solver": (
        lambda p: _edit(p.store / "manifest.json", lambda m: m.update(solver="heun", guidance=7.0)),
        _EVALUATE, r"STUDENT was trained on \(solver is 'heun', the student's is 'ddim'; guidance is 7",
        set()),
    "evaluate, a store without a position": (
        lambda p: _edit(p.store / "manifest.json", lambda m: m.update(kept=[20, 10, 5])), _EVALUATE,
        r"positions \[15\] were not kept in .*STORE", set()),
    "evaluate, a student that does not say": (
        lambda p: _edit(p.student / "config.json", lambda c: c.update(trajectories={})), _EVALUATE,
        r"STUDENT: does not say .* accepted is .*ard distill", set()),
    "evaluate, a reference in other features": (
        lambda p: Statistics.of(torch.randn(9, 3), 9).save(p.folder / "other.safetensors", "?"),
        f"{_EVALUATE} --reference other.safetensors", "makes 64 features, the reference has 3", set()),
    "evaluate, a manifest without the positions": (
        lambda p: _edit(p.store / "manifest.json", lambda m: m.pop("kept")), _EVALUATE,
        r"manifest.json: does not describe a folder of `ard record` \(no 'kept'\)", set()),
    "evaluate, a classifier of something else": (
        lambda p: (p.folder / "config.json").write_text("[]"), f"{_EVALUATE} --classifier .",
        r"config.json: holds no model, wanted is a Classifier", set()),
    "distill, a run of something else": (
        lambda p: (p.student / "run.json").write_text("[]"), _DISTILL.replace("OUT", "STUDENT"),
        "run.json: does not describe a run", set()),
    "diagnose, a store of another length": (
        lambda p: _edit(p.store / "manifest.json", lambda m: m.update(solver_steps=50)), _DIAGNOSE,
        "solver_steps is 50, the student's is 25", set()),
    "diagnose, a converted student without its teacher": (
        lambda p: _edit(p.student / "config.json", lambda c: c["trajectories"].update(teacher=None)),
        _DIAGNOSE, "does not say which states of which teacher", set()),
    "finetune, a store of another solver": (
        lambda p: (shutil.copytree(p.student, p.folder / "FILE" / "student"),
                   _edit(p.store / "manifest.json", lambda m: m.update(guided_channels=3))),
        _FINETUNE, "guided_channels is 3, the student's is None", set()),
    "record, guidance of no number": (
        _nothing, f"{_RECORD} --guidance nan", "guidance is nan, accepted is a finite", set()),
    "record, more guided channels than there are": (
        _nothing, f"{_RECORD} --guided-channels 2", r"guided_channels is 2, accepted are 1\.\.1", set()),
    "record, seed below zero": (_nothing, f"{_RECORD} --seed -1", "seed is -1, accepted", set()),
    "record, numbers that overflow": (
        lambda p: _scale(p.teacher), _RECORD, r"samples 0\.\.7 are not finite; .*try --dtype float32",
        {"manifest.json"}),
    "distill, seed below zero": (_nothing, f"{_DISTILL} --seed -1", "seed is -1, accepted", set()),
    "distill, a solver for what is recorded": (
        _nothing, f"{_DISTILL} --solver heun --guidance 4",
        r"^ard distill: solver is heun, guidance is 4.0, but the trajectories of .*STORE are made already",
        set()),
    "sample, seed below zero": (_nothing, f"{_SAMPLE} --seed -1", "seed is -1, accepted", set()),
    "sample, latents and a VAE": (
        _nothing, f"{_SAMPLE} --latents --vae FILE", "latents and vae are both given", set()),
    "demo, no iterations": (
        _nothing, "demo --teacher TEACHER --out OUT --iterations 0", "iterations is 0, accepted", set()),
    "train-teacher, dropout of more than all": (
        _nothing, "train-teacher --out OUT --dataset digits --class-dropout 7",
        r"class_dropout is 7\.0, accepted is a share", set()),
    "train-teacher, no heads": (
        _nothing, "train-teacher --out OUT --dataset digits --heads 0", "heads is 0, accepted", set()),
    "statistics, too few to compare": (
        _nothing, "statistics --out OUT --dataset digits --keep 0", "keep is 0, accepted", set()),
    "evaluate, no batch": (_nothing, f"{_EVALUATE} --batch-size 0", "batch_size is 0", set()),
    "train-teacher, no data": (
        _nothing, "train-teacher --out OUT --data FILE", "no such file; Fashion-MNIST", set()),
    "train-teacher, damaged data": (
        _idx_folder, "train-teacher --out OUT --data FILE", "not a complete gzip file", set()),
    "train-teacher, heads that do not divide": (
        _nothing, "train-teacher --out OUT --dataset digits --heads 3", "multiples of heads", set()),
    "train-classifier, damaged data": (
        _idx_folder, "train-classifier --out OUT --data FILE", "not a complete gzip file", set()),
    "statistics, no data": (
        _nothing, "statistics --out x.safetensors --data FILE", "no such file; Fashion-MNIST", set()),
    "statistics, a name that evaluate would not read": (
        _nothing, "statistics --out OUT --dataset digits", "OUT, accepted is the name of a .safetensors file",
        set()),
    "flops, unknown model": (
        _nothing, "flops --model DiT-M/3 --out OUT", "model is 'DiT-M/3', accepted are", set()),
    "flops, N deeper than the model": (
        _nothing, "flops --model DiT-S/8 --history-layers 13 --out OUT", r"accepted are 0\.\.12", set()),
    "flops, size that does not divide": (
        _nothing, "flops --model DiT-S/8 --input-size 33 --out OUT", "multiples of patch_size", set()),
    "convert, no file": (
        _nothing, "convert --weights FILE --out OUT --preset DiT-S/8", "no such file", set()),
    "convert, archive with code": (
        _evil_archive, "convert --weights evil.pt --out OUT --preset DiT-S/8", "evil.pt: refused", set()),
    "convert, pickle with code": (
        _evil_pickle, "convert --weights evil.pt --out OUT --preset DiT-S/8", "evil.pt: refused", set()),
    "convert, not tensors": (
        lambda p: torch.save([1, 2], p.folder / "FILE"), "convert --weights FILE --out OUT --preset DiT-S/8",
        "accepted is a mapping of names to tensors", set()),
    "convert, another architecture": (
        lambda p: torch.save({"pos_embed": torch.zeros(1, 16, 384)}, p.folder / "FILE"),
        "convert --weights FILE --out OUT --preset DiT-S/8", "does not fit the model: missing", set()),
    "convert, an option for what is in the folder": (
        _nothing, "convert --weights TEACHER --out OUT --prediction x0",
        "prediction is x0, but .*TEACHER describes itself", set()),
    "convert, a file in the way": (
        lambda p: p.out.write_text("x"), "convert --weights TEACHER --out OUT", "OUT is in the way; remove",
        {""}),
    "convert, unknown preset": (
        lambda p: torch.save({}, p.folder / "FILE"), "convert --weights FILE --out OUT --preset DiT-M/3",
        "DiT-M/3", set()),
}  # fmt: skip


_REMOTE = "s3://bucket/x"


def _path_options() -> list[tuple[str, str]]:
    """Every option of every command that is a path."""
    return [
        (name, field.name)
        for name, (config, _) in cli._COMMANDS.items()
        for field in dataclasses.fields(config)
        if "Path" in str(field.type) or field.name == "real"
    ]


@pytest.mark.parametrize(("command", "option"), _path_options(), ids="-".join)
def test_an_address_of_elsewhere_is_refused_before_anything_is_made(
    command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    needed = {
        name: _REMOTE if name == option else "x"
        for name in (f.name for f in dataclasses.fields(cli._COMMANDS[command][0]) if _is_needed(f))
    }
    words = [w for name, value in {**needed, option: _REMOTE}.items()
             for w in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main([command, *words])
    assert caught.value.code == 1
    (line,) = _messages(capsys.readouterr().err)
    assert line.startswith(f"ard {command}: --{option.replace('_', '-')} is {_REMOTE}, accepted is a path")
    assert not any(tmp_path.iterdir())


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@pytest.mark.parametrize(
    "address", ["s3://bucket/x", "gs://b/x", "hf://user/name", "file:///tmp/x", "https://h/x"]
)
def test_an_address_of_elsewhere_is_refused_in_python(
    address: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    before = _files(place.folder)
    student = load_student(place.student)[0]
    for call in (
        lambda: record(RecordConfig(place.teacher, Path(address), samples=2)),
        lambda: distill(DistillConfig(place.teacher, Path(address), place.store, history_layers=2)),
        lambda: sampling.run(sampling.SampleConfig(place.student, Path(address), samples=2)),
        lambda: TrajectoryStore(address),
        lambda: load_teacher(address),
        lambda: student.save_pretrained(address),
        lambda: ARDTransformer.from_pretrained(address),
    ):
        with pytest.raises(ValueError, match="accepted is a path in this machine's file system") as error:
            call()
        assert address.replace(":///", "://") in str(error.value)  # what pathlib leaves of it
    assert _files(place.folder) == before


@pytest.mark.parametrize("path", ["C:/x", "a:b", "x", "/s3:/x", "./s3:/x", "user/name"])
def test_paths_of_this_machine_are_accepted(path: str) -> None:
    check_local("test", "path", path)


def test_output_that_nobody_reads_ends_quietly() -> None:
    """`ard flops | head`."""
    command = [sys.executable, "-m", "ard", "flops"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize("case", _BAD)
def test_bad_input_is_one_clear_line(
    place: Place, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, command, message, remains = _BAD[case]
    damage(place)
    monkeypatch.chdir(place.folder)
    before = {name: (place.folder / name).read_bytes() for name in _files(place.folder)}
    with pytest.raises(SystemExit) as caught:
        main(place.expand(command))
    assert caught.value.code == 1
    (line,) = _messages(capsys.readouterr().err)
    assert re.match(rf"ard {command.split()[0]}: (?!{command.split()[0]}: )", line), line
    assert re.search(message, line), line
    after = {name: (place.folder / name).read_bytes() for name in _files(place.folder)}
    assert {name: after.get(name) for name in before} == before
    added = {name for name in after if name not in before}
    assert {name.removeprefix("OUT/").split("/")[0] for name in added} <= remains
    assert not Path("/tmp/ard-evil-was-executed").exists()


def _limited(arguments: list[str], size: int) -> subprocess.CompletedProcess[str]:
    """The real command, where a file cannot grow beyond `size` bytes: what a full disk looks like to a
    writer."""
    return subprocess.run(
        [sys.executable, "-m", "ard", *arguments], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "size", "remains"),
    [(_RECORD, 20_000, {"manifest.json"}),
     (f"{_DISTILL} --batch-size 4 --sample-every 0", 100_000, {"run.json", "log.jsonl", "tensorboard"}),
     (_SAMPLE, 600, set()),
     ("convert --weights FILE --out OUT --preset DiT-S/8", 1_000_000, set())],
    ids=["record", "distill", "sample", "convert"],
)  # fmt: skip
def test_a_full_disk_leaves_nothing_half_written(
    place: Place, command: str, size: int, remains: set[str]
) -> None:
    if "convert" in command:
        from ard.models import DiT

        torch.save(DiT.from_preset("DiT-S/8", num_classes=1000).state_dict(), place.folder / "FILE")
    done = _limited(place.expand(command), size)
    assert done.returncode == 1, done.stderr
    (line,) = _messages(done.stderr)
    assert line.startswith(f"ard {command.split()[0]}: "), done.stderr
    assert "File too large" in line or "could not be written" in line
    assert {name.split("/")[0] for name in _files(place.out)} <= remains
    assert not [*place.folder.rglob("*.tmp")]


def test_a_checkpoint_with_code_is_not_executed_by_the_real_command(place: Place) -> None:
    _evil_pickle(place)
    command = ["convert", "--weights", str(place.folder / "evil.pt"), "--out", str(place.out)]
    done = subprocess.run(
        [sys.executable, "-m", "ard", *command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "evil.pt: refused" in done.stderr
    assert not Path("/tmp/ard-evil-was-executed").exists()
    assert not place.out.exists()


def test_one_process_commands_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All processes of torchrun would make the same report and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--student", "nowhere", "--trajectories", "nowhere", "--out", "nowhere"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("ard evaluate: WORLD_SIZE is 2, accepted is 1")
    with pytest.raises(SystemExit):
        main(["record", "--teacher", "nowhere", "--out", "nowhere"])
    assert "nowhere: no config.json there" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["flops", "demo"])
def test_an_interrupted_command_says_whether_it_goes_on(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, command, (cli._COMMANDS[command][0], interrupted))
    with pytest.raises(SystemExit) as stopped:
        main([command])
    assert stopped.value.code == 130
    said = "; the same command goes on" if command == "demo" else ""
    assert capsys.readouterr().err == f"\nard {command}: interrupted{said}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for command in _COMMANDS:
        assert command in text
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"usage: ard {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["distil"], ["distill"], ["sample", "--samples", "many"]])
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err


def _documented() -> list[str]:
    """The commands in the fenced blocks of README.md and docs/, their lines joined, without comments."""
    root = Path(__file__).parents[2]
    found = []
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [m[1] for line in lines if (m := re.match(r"(?:.* -m )?ard +([a-z].*)", line))]
    return found


def test_the_documented_commands_are_commands() -> None:
    """Every option is one, and what it needs is there."""
    commands = _documented()
    assert {"convert", "record", "distill", "encode", "finetune", "sample"} <= {
        c.split()[0] for c in commands
    }
    for command in commands:
        try:
            parse(shlex.split(command, comments=True))
        except SystemExit:
            pytest.fail(f"ard {command}")


def test_the_commands_work_together(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """record, distill, sample: every file that was announced is there."""
    monkeypatch.chdir(place.folder)
    o = "--iterations 2 --batch-size 4 --checkpoint-every 2 --log-every 1 --sample-every 2"
    main(place.expand(f"record --teacher TEACHER --out {place.out}/store --samples 20"))
    main(place.expand(f"distill --teacher TEACHER --trajectories {place.out}/store --out {place.out}/run {o} "
                      "--history-layers 1"))  # fmt: skip
    main(place.expand(f"sample --student {place.out}/run/student --out {place.out}/samples --samples 3"))
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()] == ["trajectories", "student", "samples"]
    expected = {"store/manifest.json", "run/student/model.safetensors", "run/samples/step-00000002.png",
                "run/log.jsonl", "run/run.json", "samples/samples.png", "samples/samples.npz"}  # fmt: skip
    assert expected <= _files(place.out)
