"""Sampling from a student: S network evaluations, each fed with the ones before it."""

from __future__ import annotations

import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ard.checkpoints import WEIGHTS, load_student, sha256, write_json
from ard.data import Stream, check_counts, check_folder, check_seed, index_noise, to_uint8
from ard.encoding import VAE_WEIGHTS, decode, load_decoder
from ard.locks import acquire, release
from ard.models import ARDTransformer
from ard.models.dit import check_inputs, check_labels
from ard.pictures import image_grid, save_png
from ard.precision import PrecisionConfig, computing, settled
from ard.sample_files import (
    FORMAT,
    assembling,
    discard_empty,
    first_samples,
    missing,
    parts_folder,
    read_parts,
    write_npz,
)
from ard.shards import Shards, began_with, worker, worker_device
from ard_kernels.backends import forced


@torch.no_grad()
def sample(student: ARDTransformer, noise: Tensor, labels: Tensor, cuda_graph: bool | None = None) -> Tensor:
    """The student's trajectories.

    Args:
        student: the student (of a DistributedDataParallel its `module`).
        noise: (B, C, h, w), in the dtype of the student's weights, or under autocast.
        labels: (B,) int64 or int32 in 0..num_classes-1. Both are on the student's device.
        cuda_graph: replay all S steps as one CUDA graph, which takes the launches off the host: the same
            kernels, the same bits. True records at the first call with these shapes; False never does. None,
            the default, records at the second such call where that is safe: on a GPU, when no forward hook
            and no dispatch mode wants to see the layers run. A graph keeps the memory of its pass. It is
            recorded again when a weight has moved, and dropped with the student; weights changed in place
            need nothing.

    Returns:
        (B, S, C, h, w) in the dtype of the noise: states 1..S. path[:, -1] is the result.

    Raises:
        ValueError: an argument that does not fit; the message names it.

    The history layers keep keys and values of earlier steps, in the autocast dtype where there is one, else
    in the dtype of the weights.
    """
    if not isinstance(getattr(student, "_orig_mod", student), ARDTransformer):  # torch.compile's wrapper
        raise ValueError(f"sample: student is {type(student).__name__}, accepted is an ARDTransformer")
    shape = (student.channels, *student.input_size)
    check_inputs("sample", student.pos_embed, shape, {"noise": noise, "labels": labels})
    check_labels("sample", labels, student.num_classes)
    if cuda_graph is not False:
        with _recording:
            graph = _graph(student, noise, labels, cuda_graph is True)
            if graph is not None:
                return graph.replay(noise, labels)
    return _sample(student, noise, labels)


def _sample(student: ARDTransformer, noise: Tensor, labels: Tensor) -> Tensor:
    tables, cache = student.modulation(labels), student.cache(len(noise), noise.device)
    path = noise.new_empty(len(noise), student.steps, *noise.shape[1:])
    state = noise
    for step in range(student.steps):
        path[:, step] = student.step(state, step, tables, cache)
        state = path[:, step]
    return path


class _Graph:
    """All S steps, recorded for one batch. Reads and writes memory of its own."""

    def __init__(self, student: ARDTransformer, noise: Tensor, labels: Tensor) -> None:
        with torch.cuda.device(noise.device), torch.inference_mode(False), torch.no_grad():
            self.noise, self.labels = noise.clone(), labels.clone()
            # Unrecorded first: kernels compile and libraries set themselves up, which cannot be recorded.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                _sample(student, self.noise, self.labels)
            torch.cuda.current_stream().wait_stream(stream)
            # Autocast keeps cast weights. Those made outside the graph would be freed behind its back, and
            # those made inside hold nothing before the first replay.
            torch.clear_autocast_cache()
            self.graph = torch.cuda.CUDAGraph()
            try:
                # "thread_local": other threads (a data loader pinning memory) may go on using CUDA.
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.path = _sample(student, self.noise, self.labels)
            finally:
                torch.clear_autocast_cache()

    def replay(self, noise: Tensor, labels: Tensor) -> Tensor:
        self.noise.copy_(noise)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.path.clone()


@dataclass
class _Recordings:
    """The graphs of one student, by what they were recorded for, the last used last."""

    addresses: tuple[int, ...]
    """Of its weights."""
    graphs: OrderedDict[Hashable, _Graph | None] = field(default_factory=OrderedDict)
    """None: met once, not recorded."""
    refused: bool = False
    """Recording failed: not tried again unless asked for."""


_recordings: WeakKeyDictionary[ARDTransformer, _Recordings] = WeakKeyDictionary()
_recording = threading.Lock()

# A graph holds the memory of its pass. A program that samples has a full and a last batch, perhaps with and
# without autocast.
_GRAPHS = 4


def _graph(student: ARDTransformer, noise: Tensor, labels: Tensor, at_once: bool) -> _Graph | None:
    """The graph for these inputs, or None where this call must run without."""
    reason = _unsafe(noise, labels)
    addresses = None if reason else _addresses(student)
    if addresses is None:
        if at_once:
            reason = reason or "a module has a forward hook, or a weight is no plain tensor"
            raise ValueError(f"sample: cuda_graph is True, which cannot be here: {reason}")
        return None
    known = _recordings.get(student)
    if known is None or known.addresses != addresses:
        known = _recordings[student] = _Recordings(addresses)
    if known.refused and not at_once:
        return None
    key = _key(noise, labels)
    if known.graphs.get(key) is None:
        met = key in known.graphs or at_once
        try:
            known.graphs[key] = _Graph(student, noise, labels) if met else None
        except RuntimeError as error:
            if at_once:
                raise
            known.refused = True
            warnings.warn(f"sample: runs without a CUDA graph, recording failed: {error}", stacklevel=3)
            return None
    known.graphs.move_to_end(key)
    while len(known.graphs) > _GRAPHS:
        known.graphs.popitem(last=False)
    return known.graphs[key]


def _unsafe(noise: Tensor, labels: Tensor) -> str | None:
    """Why these inputs, here and now, cannot go through a graph."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if noise.device.type != "cuda" or labels.device != noise.device:
        return f"noise is on {noise.device}, labels on {labels.device}, accepted is one CUDA device"
    if is_in_torch_dispatch_mode():
        return "a dispatch mode (a FLOP counter, fake tensors) is on"
    if torch.cuda.is_current_stream_capturing():
        return "another CUDA graph is being recorded"
    return None


def _addresses(student: ARDTransformer) -> tuple[int, ...] | None:
    """Where the weights lie; None where a graph could not tell that it is out of date."""
    addresses = []
    modules: list[nn.Module | None] = [student]
    while modules:
        module = modules.pop()
        if module is None:
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        modules.extend(module._modules.values())
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                if type(tensor) not in (Tensor, nn.Parameter):
                    return None
                addresses.append(tensor.data_ptr())
    return tuple(addresses)


def _key(noise: Tensor, labels: Tensor) -> Hashable:
    """Whatever chooses the kernels, and the stream, on which alone replays keep their order."""
    return (
        noise.shape, noise.stride(), noise.dtype, noise.device, labels.dtype,
        torch.cuda.current_stream(noise.device).cuda_stream,
        torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), forced(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.fp32_precision,
    )  # fmt: skip


@dataclass(frozen=True)
class SampleConfig(PrecisionConfig):
    """Sample from a student: a picture grid, and all images as an .npz for the ADM evaluator.

    What a student in a latent space makes is decoded by --vae, or kept as it is by --latents.
    """

    student: Path
    """Folder of the student."""
    out: Path
    """Folder for samples.png, samples.npz (arr_0: (n, h, w, 1 or 3) uint8; labels: (n,)) and sample.json, how
    they were made."""
    samples: int = 100
    """How many."""
    labels: tuple[int, ...] | None = None
    """Classes, repeated as often as needed; default: all in turn."""
    batch_size: int = 100
    """Samples per pass."""
    seed: int = 0
    """Seed of the noise. That of sample i is a function of (seed, i), and not that of a trajectory of `ard
    record`."""
    latents: bool = False
    """Write the result's float32 values (n, C, h, w) instead of uint8 images."""
    vae: Path | None = None
    """Folder of a diffusers AutoencoderKL that decodes the latents."""


def check_finite(folder: Path, predictions: Tensor) -> None:
    if not predictions.isfinite().all():
        raise ValueError(f"{folder}: the student's predictions are not finite")


_SHOWN = 100  # on the picture


def run(config: SampleConfig) -> None:
    """Write samples.png, samples.npz and sample.json.

    Processes may share the work: the files are the same, whatever their number, with as many threads in each.
    A killed call of the same options goes on. Host memory holds a batch; the disk, until the end, the samples
    twice.

    Raises:
        ValueError: an option that is not accepted, or predictions that are not finite.
    """
    check_counts("sample", samples=config.samples, batch_size=config.batch_size)
    check_seed(config.seed, "sample")
    check_folder("sample", config.out)
    student, _ = load_student(config.student)
    device = worker_device()
    vae = _vae(config, student.channels, device)
    classes = torch.tensor(config.labels if config.labels else range(student.num_classes))
    check_labels("sample", classes, student.num_classes)
    student.to(device)

    def make(some: Tensor) -> dict[str, Tensor]:
        # Not the trajectories' stream: a student would show what it makes of the noise it was trained on.
        noise = index_noise(some, (student.channels, *student.input_size), config.seed, Stream.SAMPLE)
        labels = classes[some % len(classes)]
        with computing(config.precision, device):
            result = sample(student, noise.to(device), labels.to(device))[:, -1]
        check_finite(config.student, result)
        result = (result if vae is None else decode(vae, result)).cpu()
        return {"samples": result if config.latents else to_uint8(result).permute(0, 2, 3, 1).contiguous()}

    options = {
        "format": FORMAT, "student": sha256(config.student / WEIGHTS), "samples": config.samples,
        "vae": None if config.vae is None else sha256(config.vae / VAE_WEIGHTS), "labels": config.labels,
        "latents": config.latents, "precision": config.precision, "seed": config.seed,
        "shard_size": config.batch_size,
    }  # fmt: skip
    folder = parts_folder(config.out, options)  # the same for all processes, whatever "auto" comes to there
    before = began_with(folder, "precision")
    precision, why = settled(config.precision, device, config.out, before)
    config = replace(config, precision=precision)
    manifest = json.loads(json.dumps({**options, "precision": precision}))
    rank, world = worker()
    acquire(config.out, rank)
    try:
        parts = Shards.begin(folder, "sample", manifest)
        parts.fill(make, config.batch_size, "sample")
        with assembling(config.out, parts) as ours:
            if ours:
                _assemble(config, parts, classes[torch.arange(config.samples) % len(classes)], why)
            elif folder.is_dir() and (count := missing(parts)):
                print(f"rank {rank}: done; {count} of {len(parts)} parts are other processes'")
    finally:
        release(config.out, rank)
        if world == 1:
            discard_empty(config.out, folder)


def _assemble(config: SampleConfig, parts: Shards, labels: Tensor, precision: dict[str, str]) -> None:
    from ard.runs import plain, versions  # here: it brings TensorBoard

    write_npz(config.out / "samples.npz", read_parts(parts), config.samples, labels)
    shown = first_samples(parts, _SHOWN)
    if not config.latents:
        shown = shown.permute(0, 3, 1, 2).float() / 127.5 - 1
    save_png(config.out / "samples.png", image_grid(shown, columns=min(10, config.samples)))
    rounding = None if config.latents else "nearest"  # of [-1, 1] to 0..255
    record = {"config": plain(config), "precision": precision, "rounding": rounding, "versions": versions()}
    write_json(config.out / "sample.json", record)
    print(f"samples: {config.out / 'samples.png'}, {config.out / 'samples.npz'}")


def _vae(config: SampleConfig, channels: int, device: torch.device) -> Any:
    """The VAE that decodes the student's latents; None where there is nothing to decode."""
    if config.vae is None:
        if channels not in (1, 3) and not config.latents:
            raise ValueError(f"sample: the student has {channels} channels, which are no picture; accepted "
                             "are --vae FOLDER, which decodes them, or --latents")  # fmt: skip
        return None
    if config.latents:
        raise ValueError("sample: latents and vae are both given, accepted is one of them")
    return load_decoder(config.vae, channels, device, "sample")
