"""Weights from elsewhere as folders that the other commands take, and such folders as what others take."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ard.checkpoints import (
    CONFIG,
    WEIGHTS,
    MisfitError,
    describing,
    load_student,
    load_teacher,
    load_weights,
    read_json,
    read_metadata,
    replacing,
    save_student,
    save_teacher,
    sha256,
    write_checkpoint,
    write_json,
    write_tensors,
)
from ard.diffusion import Diffusion, Prediction, Schedule
from ard.foreign import Checkpoint, explained, read_checkpoint, read_sharded
from ard.layouts import (
    from_diffusers,
    from_released,
    released_checkpoint,
    released_steps,
    to_diffusers,
)
from ard.models import PRESETS, ARDTransformer, DiT
from ard.models.dit import TimeFrequencies

_DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

_PIPELINE_NULL_CLASS = 1000  # written into the pipeline's __call__, whatever the model's config says


@dataclass(frozen=True)
class ConvertConfig:
    """Make a folder that the other commands take from weights in another layout, or the other way round.

    A file may hold a public DiT or a student of the authors' released code (.pt with nothing but data, or
    .safetensors; bare, or as training scripts keep weights); a folder, a DiTTransformer2DModel of diffusers
    or a teacher or student of ours.
    """

    weights: Path
    """File of weights, or folder. It is never executed: a pickle that holds anything but data is refused."""
    out: Path
    """Folder to write; with --to released, the .pt file."""
    to: Literal["ard", "diffusers", "released"] = "ard"
    """What to write. diffusers: a teacher as DiTTransformer2DModel, a student as ARDPipeline. released: a .pt
    file for the code of the public DiT (a teacher) or of the authors' ARD (a student)."""
    layout: Literal["auto", "dit", "released"] = "auto"
    """What a file holds: the public DiT, or a student of the released code. auto: what has a second final
    layer is a student."""
    weights_key: str | None = None
    """Which weights of a file are meant, with dots: ema, state_dict.model. Default: the only average that is
    in it, else the only weights; where that leaves a choice, the file is refused and the keys are listed."""
    ignore: tuple[str, ...] = ()
    """Patterns of names in the file to leave out, such as 'projectors.*': heads that only training needs."""
    preset: str = "DiT-XL/2"
    """Architecture of what is in a file: DiT-{S,B,L,XL}/{2,4,8}."""
    input_size: int = 32
    """Height and width of its latent: 32 for 256 px, 64 for 512 px."""
    num_classes: int = 1000
    """Number of its classes, the null class not counted."""
    null_class: bool = True
    """Its class table has a last row for "no class". A teacher without one can only be used unguided."""
    noise_schedule: Schedule = "linear"
    """Noise schedule a teacher was trained with, where the source does not say."""
    prediction: Prediction = "eps"
    """What it predicts, where the source does not say."""
    time_scale: float | None = None
    """Of a flow: what the network calls the end of its time, 1 (SiT) or 1000."""
    teacher: Path | None = None
    """Folder of a teacher with the architecture and noise schedule of what is in the file, instead of the
    options from preset to time_scale. A student is recorded as distilled from it, which `ard evaluate` wants
    to know."""
    history_layers: int | None = None
    """N of a released student; default: what its training arguments say if they are in the file, else 6."""
    time_frequencies: TimeFrequencies | None = None
    """Time embedding of a diffusers folder; default: what a folder of --to diffusers records, else diffusers'
    own, which the output then agrees with. The weights of the public DiT were trained with other frequencies:
    if a folder holds those, say "dit"."""


# Options that say what the weights are.
_ARCHITECTURE = ("preset", "input_size", "num_classes", "null_class")
_PROCESS = ("noise_schedule", "prediction", "time_scale")
_SELECTION = ("weights_key", "ignore")  # which of the weights in a file
_OPTIONS = (*_ARCHITECTURE, *_PROCESS, "layout", "teacher", "history_layers", "time_frequencies")
# What the folders hold that this command writes.
_WRITTEN = {CONFIG, WEIGHTS, _DIFFUSERS_WEIGHTS[0], "model_index.json", "student"}


def _check_out(config: ConvertConfig) -> None:
    """Nothing is replaced but a folder of what this command has written."""
    out, weights = config.out, config.weights
    if out.resolve() in (weights.resolve(), *weights.resolve().parents):
        raise ValueError(f"convert: out is {out}, where the weights are; accepted is another place")
    if config.to == "released" and out.suffix != ".pt":  # by which `convert` reads it
        raise ValueError(f"convert: out is {out}, accepted with --to released is the name of a .pt file")
    there = [path for path in (out, *out.parents) if path.exists() and not path.is_dir()]
    if config.to == "released" and out.exists():
        there = [out]
    if there:
        raise ValueError(f"convert: out is {out}, but {there[0]} is in the way; remove it, or name another")
    if out.is_dir() and (others := sorted({path.name for path in out.iterdir()} - _WRITTEN)):
        raise ValueError(
            f"convert: out is {out}, which holds {', '.join(others[:4])}; accepted is a folder that is not "
            "there yet, or one of an earlier conversion"
        )


def _check_unused(config: ConvertConfig, names: Iterable[str], why: str) -> None:
    """An error if one of these options, which have no effect here, is given."""
    defaults = {f.name: f.default for f in fields(ConvertConfig)}
    given = {name: getattr(config, name) for name in names}
    if ignored := [f"{name} is {value}" for name, value in given.items() if value != defaults[name]]:
        raise ValueError(f"convert: {', '.join(ignored)}, but {why}; leave that out")


def convert(config: ConvertConfig) -> None:
    _check_out(config)
    model = _read_folder(config) if config.weights.is_dir() else _read_file(config)
    if config.to == "released":
        write_checkpoint(config.out, released_checkpoint(model))
    elif config.to == "diffusers":
        _write_diffusers(model, config.out)
    elif isinstance(model, ARDTransformer):
        save_student(config.out, model, model.trajectories)
    else:
        save_teacher(config.out, model, _process(model))
    print(f"{'teacher' if isinstance(model, DiT) else 'student'}: {config.out}")


def _process(teacher: DiT) -> Diffusion:
    assert teacher.diffusion is not None  # every reader sets it
    return teacher.diffusion


def _describes_nothing(folder: Path) -> FileNotFoundError:
    """The error about a folder without a config.json, with what to do with a folder of its kind."""
    accepted = "a folder of this project, or the transformer folder of a diffusers pipeline"
    if (folder / "transformer" / CONFIG).is_file():
        accepted = f"{folder / 'transformer'}, the model of this pipeline"
    elif (folder / ".metadata").is_file():  # torch.distributed.checkpoint, as FSDP writes it
        tool = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        accepted = f"a file: {tool} {folder} FILE.pt makes one"
    elif (folder / "zero_to_fp32.py").is_file():  # DeepSpeed
        accepted = f"a file: python {folder / 'zero_to_fp32.py'} {folder} OUT makes one, if you trust it"
    return FileNotFoundError(f"{folder}: no {CONFIG} there; accepted is {accepted}")


def _read_folder(config: ConvertConfig) -> DiT | ARDTransformer:
    folder = config.weights
    if not (folder / CONFIG).is_file():
        raise _describes_nothing(folder)
    description = read_json(folder / CONFIG)
    if not isinstance(description, dict) or "_class_name" not in description:
        _check_unused(config, (*_OPTIONS, *_SELECTION), f"{folder} describes itself")
        student = isinstance(description, dict) and description.get("class") == "ARDTransformer"
        return load_student(folder)[0] if student else load_teacher(folder)[0]
    path = next((folder / name for name in _DIFFUSERS_WEIGHTS if (folder / name).is_file()), None)
    index = next(
        (file for name in _DIFFUSERS_WEIGHTS if (file := folder / f"{name}.index.json").is_file()), None
    )
    if path is None and index is None:
        raise FileNotFoundError(f"{folder}: no {' or '.join(_DIFFUSERS_WEIGHTS)} there")
    unused = (*_ARCHITECTURE, "layout", "teacher", "history_layers")
    _check_unused(config, unused, f"{folder} is a folder of diffusers, which describes its architecture")
    source = path or index
    assert source is not None
    with describing(source, "teacher"):
        ours = json.loads(read_metadata(source).get("ard", "{}"))
        if "diffusion" in ours:
            _check_unused(config, _PROCESS, f"{source} records what it was trained with")
        diffusion = Diffusion(**ours["diffusion"]) if "diffusion" in ours else _diffusion(config)
        frequencies = config.time_frequencies or ours.get("time_frequencies", "diffusers")
    read = read_checkpoint if path is not None else read_sharded
    checkpoint = read(source, config.weights_key, config.ignore)
    with _announced(checkpoint):
        teacher = from_diffusers(description, checkpoint.tensors, frequencies, source)
    teacher.diffusion = diffusion
    return teacher


@contextlib.contextmanager
def _announced(checkpoint: Checkpoint, config: ConvertConfig | None = None) -> Iterator[None]:
    """Say what was chosen in a file, and which option lets it in if the block refuses it."""
    for note in checkpoint.notes:
        print(note)
    try:
        with explained(checkpoint):
            yield
    except MisfitError as error:
        raise ValueError(f"{error}{_class_counts(error, config) if config else ''}") from None


def _class_counts(error: MisfitError, config: ConvertConfig) -> str:
    """Which options would fit a class table that has another number of rows; nothing if it fits."""
    own, found = (tensors.get("y_embedder.embedding_table.weight") for tensors in (error.own, error.found))
    if own is None or found is None or own.shape == found.shape or own.shape[1:] != found.shape[1:]:
        return ""
    rows = len(found)
    table = f"; its class table has {rows} rows: "
    if config.teacher is not None:
        return f"{table}another teacher than {config.teacher}, or --preset and its like instead of it"
    with_null = f"--num-classes {rows - 1} if the last one is the null class, "
    return f"{table}{with_null}--num-classes {rows} --no-null-class if there is none (guidance needs one)"


def _read_file(config: ConvertConfig) -> DiT | ARDTransformer:
    if config.weights.name.endswith(".index.json"):
        raise ValueError(
            f"convert: weights is {config.weights}, accepted is its folder, {config.weights.parent}"
        )
    checkpoint = read_checkpoint(config.weights, config.weights_key, config.ignore)
    arguments = checkpoint.arguments
    if "ard" in arguments:  # a student written with --to released
        _check_unused(config, _OPTIONS, f"{config.weights} holds a student and describes it")
        with describing(config.weights, "student"):
            ours = json.loads(arguments["ard"])
            student, trajectories = ours["config"], {**ours["trajectories"]}
        with _announced(checkpoint):
            return from_released(checkpoint.tensors, student, trajectories, config.weights)
    _check_unused(config, ["time_frequencies"], f"{config.weights} is not a folder of diffusers")
    if config.teacher is not None:
        _check_unused(config, (*_ARCHITECTURE, *_PROCESS), f"teacher is {config.teacher}, which says that")
        teacher, diffusion = load_teacher(config.teacher)
        architecture, identity = teacher.config, sha256(config.teacher / WEIGHTS)
    elif config.preset in PRESETS:
        architecture = {**PRESETS[config.preset], "input_size": config.input_size,
                        "num_classes": config.num_classes, "null_class": config.null_class}  # fmt: skip
        diffusion, identity = _diffusion(config), None
    else:
        raise ValueError(f"convert: preset is {config.preset!r}, accepted are {', '.join(PRESETS)}")
    steps = released_steps(checkpoint.tensors)
    if config.layout == "dit" or (config.layout == "auto" and steps < 2):
        _check_unused(config, ["history_layers"], f"{config.weights} holds a teacher")
        teacher = DiT(**architecture)
        with _announced(checkpoint, config):
            load_weights(teacher, checkpoint.tensors, config.weights)
        teacher.diffusion = diffusion
        return teacher
    layers = arguments.get("stack", 6) if config.history_layers is None else config.history_layers
    student = {"teacher": architecture, "steps": max(1, steps), "history_layers": layers}
    # The recipe of the released code, which has 4 steps; it says nothing of others.
    trajectories = {
        "teacher": identity if steps == 4 else None, "diffusion": diffusion.config, "solver": "ddim",
        "solver_steps": 25, "guidance": 1.5, "guided_channels": 3, "seed": None, "samples": None,
        "grid": [25, 15, 10, 5, 0] if steps == 4 else None, "state": "x0",
    }  # fmt: skip
    with _announced(checkpoint, config):
        return from_released(checkpoint.tensors, student, trajectories, config.weights)


def _diffusion(config: ConvertConfig) -> Diffusion:
    return Diffusion(config.noise_schedule, config.prediction, time_scale=config.time_scale)


def _write_diffusers(model: DiT | ARDTransformer, out: Path) -> None:
    if isinstance(model, ARDTransformer):
        try:
            from ard.pipeline import ARDPipeline
        except ImportError as error:
            raise ValueError(f"convert: a student --to diffusers {error}") from None
        with replacing(out) as temporary:
            ARDPipeline(model).save_pretrained(temporary)
        return
    description, tensors = to_diffusers(model)
    frequencies = model.config["time_frequencies"]
    # In the file's metadata, which diffusers passes over: what its config.json has no place for.
    ours = json.dumps({"diffusion": _process(model).config, "time_frequencies": frequencies})
    with replacing(out) as temporary:
        temporary.mkdir()
        write_tensors(temporary / _DIFFUSERS_WEIGHTS[0], tensors, {"format": "pt", "ard": ours})
        write_json(temporary / CONFIG, description)
    if frequencies != "diffusers":
        print(
            "note: diffusers' DiT embeds the time with frequencies 10000^(-i/127), this teacher, as the "
            "public DiT, with 10000^(-i/128): its predictions there are not the same"
        )
    if model.num_classes != _PIPELINE_NULL_CLASS:
        print(
            f"warning: diffusers' DiTPipeline takes class {_PIPELINE_NULL_CLASS} for the null class, this "
            f"teacher's is {model.num_classes}: call the model with it, or the pipeline with guidance_scale=1"
        )
