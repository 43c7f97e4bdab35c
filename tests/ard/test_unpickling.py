"""Files of strangers are data: nothing in them is executed, and their values are finite or refused; folders
are read like files."""

from __future__ import annotations

import dataclasses
import enum
import fractions
import functools
import os
import pickle
import re
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from strangers import Names, bits, furniture, make_place, plain, same, under
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ard.checkpoints import read_json, write_json
from ard.convert import ConvertConfig, convert
from ard.foreign import read_checkpoint
from ard.unpickling import Opaque, read_pickle


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("strangers"))


# Tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_other_precisions_keep_every_bit(place: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    names = {name: tensor.to(dtype) for name, tensor in plain().items()}
    torch.save({"ema": names}, tmp_path / "w.pt")
    assert bits(tmp_path / "w.pt", {name: tensor.float() for name, tensor in names.items()})
    assert not read_checkpoint(tmp_path / "w.pt").notes


def test_rounding_is_said(tmp_path: Path) -> None:
    torch.save(
        {"a": torch.tensor([1 / 3], dtype=torch.float64), "b": torch.ones(1).double()}, tmp_path / "w.pt"
    )
    assert read_checkpoint(tmp_path / "w.pt").notes == ("note: rounded from float64 to float32: a",)


def test_how_tensors_lie_does_not_matter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, views, transposed and shared storages, and a GPU that is not here."""
    names: dict[str, Any] = {name: torch.nn.Parameter(tensor) for name, tensor in plain().items()}
    names["blocks.0.attn.qkv.weight"] = names["blocks.0.attn.qkv.weight"].data.t().contiguous().t()
    both = torch.stack([names["blocks.0.attn.qkv.bias"].data, names["blocks.1.attn.qkv.bias"].data])
    names["blocks.0.attn.qkv.bias"], names["blocks.1.attn.qkv.bias"] = both
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    for new in (True, False):
        torch.save({"ema": names, "model": names}, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
        assert b"cuda:3" in (tmp_path / "w.pt").read_bytes()
        assert bits(tmp_path / "w.pt", plain())
        assert not any(t.requires_grad for t in read_checkpoint(tmp_path / "w.pt").tensors.values())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.ones(2, dtype=torch.int64), r"a \(torch\.int64"),
     (torch.ones(2).to_sparse(), r"torch\.sparse_coo"),
     (torch.ones(2, device="meta"), "meta"), (torch.ones(2, dtype=torch.complex64), r"torch\.complex64"),
     (torch.tensor([1.0, torch.nan]), r"a: not finite"), (torch.tensor([1.0, -torch.inf]), "a: not finite"),
     (torch.tensor([1e300], dtype=torch.float64), "a: not finite")],
)  # fmt: skip
def test_values_that_are_no_weights_are_refused(tmp_path: Path, tensor: Tensor, message: str) -> None:
    torch.save({"ema": {"a": tensor, "b": torch.ones(2)}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "w.pt")
    assert read_checkpoint(tmp_path / "w.pt", ignore=("a",)).tensors.keys() == {"b"}


# Nothing is executed


@dataclasses.dataclass
class _Settings:
    width: int = 32


class _Colour(enum.Enum):
    RED = 1


class _Evil:
    """Unpickled, it leaves a file at `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return eval, (f"open({str(self.mark)!r}, 'w')",)


class _System(_Evil):
    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.mark))}",)


class _Path(type(Path())):  # type: ignore[misc]
    """A path of another class, whose constructor does something."""

    def __reduce__(self) -> Any:
        return _touched, (str(self),)


def _touched(path: str) -> str:
    Path(path).touch()
    return path


class _Touch(_Evil):
    """A method of an allowed class."""

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class _Chained(_Evil):
    """Code as the arguments of the stand-ins."""

    def __reduce__(self) -> Any:
        return type(Path()), (_Evil(self.mark),)


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
@pytest.mark.parametrize("form", ["archive", "legacy", "pickle", "pickle 2"])
@pytest.mark.parametrize("evil", [_Evil, _System, _Path, _Touch, _Chained])
def test_a_pickle_with_code_is_refused_and_not_executed(
    tmp_path: Path, form: str, name: str, evil: Any
) -> None:
    path, mark = tmp_path / name, tmp_path / "executed"
    content = {**furniture(), "ema": {"weight": torch.zeros(2)}, "x": evil(mark)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, 2 if form.endswith("2") else None))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    with pytest.raises(
        ValueError, match=rf"{name}: (refused, it is not a file of plain|not a complete safe)"
    ):
        read_checkpoint(path)
    assert not mark.exists()
    path = path.rename(tmp_path / "evil.pt")  # by its other name torch would not unpickle it at all
    try:
        torch.load(path, weights_only=False) if "pickle" not in form else pickle.loads(path.read_bytes())
    except TypeError:
        assert evil is _Chained  # an open file is no part of a path, but it has been opened
    assert mark.exists(), "the file would not have done anything"


@pytest.mark.parametrize(
    "thing",
    [_Settings(), _Colour.RED, fractions.Fraction(1, 3), functools.partial(int, "3"), print, np.ones,
     re.compile("x"), torch.nn.Linear(2, 2)],
    ids=lambda thing: str(type(thing)),
)  # fmt: skip
def test_objects_with_code_are_refused_by_a_line_that_says_how_to_write_the_file(
    tmp_path: Path, thing: Any
) -> None:
    torch.save({"ema": plain(), "config": thing}, tmp_path / "w.pt")
    message = r"w\.pt: refused, .*\(.*\); accepted is a file of the weights alone: .*torch\.save\(model\."
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "w.pt")


def test_furniture_is_data(tmp_path: Path) -> None:
    """Numbers come out as Python's, paths without their methods for the disk, all else as nothing."""
    torch.save({"model": plain(), **furniture()}, tmp_path / "w.pt")
    arguments = read_checkpoint(tmp_path / "w.pt").arguments
    numbers = {name: arguments[name] for name in ("lr", "epochs", "flag", "half", "big")}
    assert numbers == {"lr": 1e-4, "epochs": 80, "flag": True, "half": 0.5, "big": 3}
    assert {type(number) for number in numbers.values()} == {float, int, bool}
    assert type(arguments["out"]) is type(PurePath())
    assert arguments["out"] == PurePath("runs/1")
    read = read_pickle(tmp_path / "w.pt")
    assert {type(read[key]) for key in ("when", "took", "zone")} == {Opaque}
    assert (read["queue"], type(read["best"]), read["best"]) == ([1, 2], dict, {"fid": [3.5]})
    assert not any(type(value).__module__.startswith("numpy") for value in arguments.values())


@pytest.mark.parametrize(
    ("code", "order", "data", "number"),
    [(b"O8", b"|", b"A" * 8, None), (b"i4", b"<", b"\3\0\0\0", 3), (b"i4", b">", b"\0\0\0\3", 3),
     (b"i4", b"<", b"\3", None)],
)  # fmt: skip
def test_a_forged_dtype_reads_no_memory(
    tmp_path: Path, code: bytes, order: bytes, data: bytes, number: int | None
) -> None:
    """NumPy's own scalar() would take eight bytes of an object dtype for the address of an object."""
    scalar = (b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00" + code
              + b"\x89\x88\x87R(K\x03X\x01\x00\x00\x00" + order
              + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbc_codecs\nencode\nX"
              + bytes([len(data), 0, 0, 0]) + data + b"X\x06\x00\x00\x00latin1\x86R\x86R.")  # fmt: skip
    torch.save({}, tmp_path / "empty.pt")
    with zipfile.ZipFile(tmp_path / "empty.pt") as empty, zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
        for name in empty.namelist():
            file.writestr(name, scalar if name.endswith("/data.pkl") else empty.read(name))
    read = read_pickle(tmp_path / "w.pt")
    assert (None if type(read) is Opaque else read) == number


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)), b"PK\x03\x04" + bytes(100)])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_bytes_that_are_nothing_are_refused_by_name(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: "):
        read_checkpoint(tmp_path / name)


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["ema"] = [loop, loop]
    for content in ({"a": 1}, [1, 2], {"ema": {"a": "b"}}, {"ema_loss": {"train": torch.ones(())}}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="accepted is a mapping of names to tensors"):
            read_checkpoint(tmp_path / "x.pt")
    torch.save({"loop": loop, "model": plain()}, tmp_path / "x.pt")  # it ends
    assert bits(tmp_path / "x.pt", plain())


# Folders


def _diffusers_folder(place: Path, folder: Path, sharded: bool) -> Names:
    convert(ConvertConfig(place / "plain", folder, to="diffusers"))
    file = folder / "diffusion_pytorch_model.safetensors"
    names = load_file(file)
    if sharded:
        files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
        for part in set(files.values()):
            save_file({name: names[name] for name in names if files[name] == part}, folder / part)
        write_json(folder / f"{file.name}.index.json", {"weight_map": files})
        file.unlink()
    return names


def test_shards_with_an_index(place: Path, tmp_path: Path) -> None:
    """As the Hugging Face libraries split what is large."""
    folder = tmp_path / "transformer"
    _diffusers_folder(place, folder, sharded=True)
    convert(ConvertConfig(folder, tmp_path / "t", time_frequencies="dit"))
    assert same(place, tmp_path / "t")
    with pytest.raises(
        FileNotFoundError, match=f"accepted is {re.escape(str(folder))}, the model of this pip"
    ):
        convert(ConvertConfig(tmp_path, tmp_path / "t2"))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    with pytest.raises(ValueError, match=f"accepted is its folder, {re.escape(str(folder))}$"):
        convert(ConvertConfig(index, tmp_path / "t2"))
    files = read_json(index)["weight_map"]
    write_json(index, {"weight_map": {**files, "more": "part-0.safetensors"}})
    with pytest.raises(ValueError, match="names more, which its files do not hold"):
        convert(ConvertConfig(folder, tmp_path / "t2"))
    for elsewhere in ({"x": "../plain/model.safetensors"}, {"x": 3}, [1]):
        write_json(index, {"weight_map": elsewhere})
        with pytest.raises(ValueError, match="accepted is a weight_map of names to files beside it"):
            convert(ConvertConfig(folder, tmp_path / "t2"))
    (folder / "part-1.safetensors").unlink()
    write_json(index, {"weight_map": files})
    with pytest.raises(FileNotFoundError, match=r"part-1\.safetensors: no such file"):
        convert(ConvertConfig(folder, tmp_path / "t2"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_diffusers_folder_is_read_like_a_file(place: Path, tmp_path: Path, prefix: str) -> None:
    names = _diffusers_folder(place, tmp_path / "d", sharded=False)
    (tmp_path / "d" / "diffusion_pytorch_model.safetensors").unlink()
    content = {
        "ema": under(prefix, {**names, "projectors.x": torch.ones(1)}),
        "model": names,
        **furniture(),
    }
    torch.save(content, tmp_path / "d" / "diffusion_pytorch_model.bin")
    options: dict[str, Any] = {"time_frequencies": "dit"}
    with pytest.raises(ValueError, match=r"unexpected projectors\.x; --ignore 'projectors\.\*'"):
        convert(ConvertConfig(tmp_path / "d", tmp_path / "t", **options))
    convert(ConvertConfig(tmp_path / "d", tmp_path / "t", **options, ignore=("projectors.*",)))
    assert same(place, tmp_path / "t")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_folders_of_sharded_training_say_what_makes_a_file(tmp_path: Path) -> None:
    dcp.save({"model": plain()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    message = r"a file: python -m torch\.distributed\.checkpoint\.format_utils dcp_to_torch \S+/dcp FILE"
    with pytest.raises(FileNotFoundError, match=message):
        convert(ConvertConfig(tmp_path / "dcp", tmp_path / "t"))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "w.pt")  # what that command calls
    assert bits(tmp_path / "w.pt", plain())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_file_that_is_cut_off_is_named(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "whole.pt"
    torch.save({"x": torch.zeros(5000)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for length in (0, 100, 5000, len(whole) - 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"whole\.pt: ") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
