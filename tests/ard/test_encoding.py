"""Cached latents are a function of the images, the VAE and the options, whoever makes them and however often
that is stopped; damage is found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import DAMAGES, damage
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from ard.data import ImageFolder, LatentStore, index_noise, open_images
from ard.encoding import EncodeConfig, encode

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _vae(folder: Path, seed: int = 0, **options: Any) -> AutoencoderKL:
    """Pixels of 2x2 to a latent of 4 channels, saved to a folder."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**{
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.5,
        "shift_factor": 0.25, **options,
    })  # fmt: skip
    vae.save_pretrained(folder)
    return vae.eval().requires_grad_(False)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _command(config: EncodeConfig) -> list[str]:
    code = (
        "from pathlib import Path; from ard.encoding import EncodeConfig, encode; "
        f"encode(EncodeConfig(Path({str(config.images)!r}), Path({str(config.vae)!r}), "
        f"Path({str(config.out)!r}), size={config.size}, shard_size={config.shard_size}, "
        f"batch_size={config.batch_size}, precision={config.precision!r}))"
    )
    return [sys.executable, "-c", code]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AutoencoderKL]:
    folder = tmp_path_factory.mktemp("vae")
    return folder, _vae(folder)


@pytest.fixture(scope="module")
def config(vae: tuple[Path, AutoencoderKL], tmp_path_factory: pytest.TempPathFactory) -> EncodeConfig:
    """8 images of 3 classes: 3 shards, the last one short, of up to 2 passes of the VAE."""
    made = tmp_path_factory.mktemp("made")
    random = np.random.default_rng(0)
    for i, name in enumerate("aaabbbbc"):
        (made / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (12, 9, 3), np.uint8)).save(made / f"images/{name}/{i}.png")
    config = EncodeConfig(
        made / "images", vae[0], made / "latents", size=8, shard_size=3, batch_size=2, precision="no"
    )
    encode(config)
    return config


@pytest.fixture(scope="module")
def other(config: EncodeConfig, tmp_path_factory: pytest.TempPathFactory) -> EncodeConfig:
    other = replace(config, out=tmp_path_factory.mktemp("other"), seed=1)
    encode(other)
    return other


def _copy(config: EncodeConfig, folder: Path) -> EncodeConfig:
    shutil.copytree(config.out, folder / "copy")
    return replace(config, out=folder / "copy")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_latents_are_samples_of_the_posterior(
    config: EncodeConfig, vae: tuple[Path, AutoencoderKL], tmp_path: Path, dtype: str
) -> None:
    """Of the image or of its mirror image, each encoded on its own; in the model's scale; rounded once."""
    encode(replace(config, out=tmp_path, dtype=dtype))  # type: ignore[arg-type]
    store, images = LatentStore(tmp_path), ImageFolder(config.images, 8)
    assert (len(store), store.shape, store.num_classes) == (8, (4, 4, 4), 3)
    eps = torch.finfo(getattr(torch, dtype)).eps
    for index in torch.arange(8).split(1):
        noise = index_noise(index, (2, 4, 4, 4), 0, stream=100)[0]
        for flip in (False, True):
            pixels, label = images.fetch(index, torch.tensor([flip]))
            latent, stored_label = store.fetch(index, torch.tensor([flip]))
            posterior = vae[1].encode(pixels).latent_dist
            z = posterior.mean[0] + posterior.std[0] * noise[int(flip)]
            # In float32 passes of one and of two images differ by some roundings of ten layers.
            torch.testing.assert_close(latent[0], 0.5 * (z - 0.25), rtol=eps, atol=max(2e-6, eps / 10))
            assert latent.dtype == torch.float32
            assert torch.equal(stored_label, label)


def test_a_mirrored_latent_is_not_the_latent_of_the_mirrored_image(
    vae: tuple[Path, AutoencoderKL], config: EncodeConfig
) -> None:
    """What the second half of a store is for: the difference is as large as the latents."""
    pixels, _ = ImageFolder(config.images, 8).fetch(torch.arange(8), torch.zeros(8, dtype=torch.bool))
    mean, mirrored = (vae[1].encode(x).latent_dist.mean for x in (pixels, pixels.flip(-1)))
    assert (mean.flip(-1) - mirrored).std() > 0.5 * mean.std()


def test_latents_are_fetched_in_any_order(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """From all shards, one of them open at a time, with the bits that the files hold."""
    monkeypatch.setattr("ard.shards._OPEN_SHARDS", 1)
    parts = [load_file(path) for path in sorted(config.out.glob("*.safetensors"))]
    latents, labels = (torch.cat([part[name] for part in parts]) for name in ("latents", "labels"))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    indices, flips = torch.tensor([7, 0, 3, 0, 7]), torch.tensor([True, False, True, True, True])
    store = open_images(str(config.out), 4, (4, 4), 3)
    x, got = store.fetch(indices, flips)
    assert torch.equal(x, latents[indices, flips.long()].float())
    assert torch.equal(got, labels[indices])
    assert torch.equal(x[0], x[4])
    assert not torch.equal(x[1], x[3])


def test_a_resumed_store_has_the_same_files(config: EncodeConfig, tmp_path: Path) -> None:
    whole, copy = _files(config.out), _copy(config, tmp_path)
    (copy.out / "shard-000001.safetensors").unlink()
    (copy.out / "shard-000002.sha256").unlink()  # killed between the shard and its checksum
    (copy.out / "shard-000000.safetensors").write_bytes(whole["shard-000000.safetensors"][:-7])
    encode(copy)
    assert _files(copy.out) == whole


def test_a_finished_store_is_not_written_again(config: EncodeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in config.out.iterdir()}
    encode(config)
    assert {path: path.stat().st_mtime_ns for path in config.out.iterdir()} == before


def test_a_killed_encoding_goes_on(config: EncodeConfig, tmp_path: Path) -> None:
    """SIGKILL when the second shard has its bytes and not yet its checksum."""
    killed = replace(config, out=tmp_path / "killed")
    *python, code = _command(killed)
    interrupted = (
        "import os, signal; from ard import shards; write = shards.write_text\n"
        "def interrupted(path, text):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if '000001' in path.name else write(path, text)\n"
        f"shards.write_text = interrupted; {code}"
    )
    command = [*python, interrupted]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    written = {name for name in _files(killed.out) if name.startswith("shard")}
    assert written == {"shard-000000.safetensors", "shard-000000.sha256", "shard-000001.safetensors"}
    encode(killed)
    left = {name: data for name, data in _files(killed.out).items() if not name.endswith(".tmp")}
    assert left == _files(config.out)


def test_two_workers_write_the_same_files(config: EncodeConfig, tmp_path: Path) -> None:
    """The first of them shards 0 and 2, the second shard 1."""
    shared = replace(config, out=tmp_path / "shared")

    def work(rank: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
        return subprocess.Popen(
            _command(shared), env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    first = work(0)
    assert first.wait(100) == 0, first.communicate()[1]
    assert sorted(path.name for path in shared.out.glob("*.safetensors")) == [
        "shard-000000.safetensors",
        "shard-000002.safetensors",
    ]
    second = work(1)
    assert second.wait(100) == 0, second.communicate()[1]
    assert _files(shared.out) == _files(config.out)


def test_what_could_change_a_bit_is_part_of_the_store(config: EncodeConfig, tmp_path: Path) -> None:
    copy = _copy(config, tmp_path)
    before = _files(copy.out)
    _vae(tmp_path / "config", act_fn="relu")
    _vae(tmp_path / "weights", seed=1)
    shutil.copytree(config.images, tmp_path / "more")
    shutil.copy(tmp_path / "more/a/0.png", tmp_path / "more/a/9.png")
    shutil.copytree(config.images, tmp_path / "longer")
    with (tmp_path / "longer/a/0.png").open("ab") as file:
        file.write(b"longer")
    changes: tuple[dict[str, Any], ...] = (
        {"seed": 1},
        {"size": 10},
        {"batch_size": 3},
        {"shard_size": 4},
        {"dtype": "float32"},
        {"precision": "bf16"},
        {"vae": tmp_path / "config"},
        {"vae": tmp_path / "weights"},
        {"images": tmp_path / "more"},
        {"images": tmp_path / "longer"},
    )
    for change in changes:
        with pytest.raises(ValueError, match=r"another recording .*name another folder with --out"):
            encode(replace(copy, **change))
    assert _files(copy.out) == before


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_repaired(
    config: EncodeConfig, other: EncodeConfig, tmp_path: Path, name: str
) -> None:
    copy = _copy(config, tmp_path)
    message = damage(copy.out, name, other.out)
    with pytest.raises(ValueError, match="run the same `ard encode` again") as caught:
        LatentStore(copy.out).fetch(torch.arange(8), torch.zeros(8, dtype=torch.bool))
    assert message in str(caught.value)
    encode(copy)
    assert _files(copy.out) == _files(config.out)


def test_no_store_and_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no manifest\.json there; accepted is a folder written by `ard encode`"
    ):
        LatentStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1}')  # of trajectories
    with pytest.raises(ValueError, match="format is 1, accepted is 'latents-1'"):
        LatentStore(tmp_path)


def test_a_store_that_does_not_fit_the_model_is_refused(config: EncodeConfig) -> None:
    with pytest.raises(
        ValueError, match=r"which has 4 channels of 4x4 in 3 classes; accepted are 4 channels of 32x32"
    ):
        open_images(str(config.out), 4, (32, 32), 1000)


def test_a_broken_image_is_named_and_its_shard_not_written(config: EncodeConfig, tmp_path: Path) -> None:
    shutil.copytree(config.images, tmp_path / "images")
    (tmp_path / "images/b/4.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"images/b/4\.png: not a usable image"):
        encode(replace(config, images=tmp_path / "images", out=tmp_path / "out"))
    assert sorted(_files(tmp_path / "out")) == [
        "manifest.json",
        "shard-000000.safetensors",
        "shard-000000.sha256",
    ]


def test_latents_beyond_the_dtype_are_refused(config: EncodeConfig, tmp_path: Path) -> None:
    """float16 ends at 65504; what training would get is infinite."""
    _vae(tmp_path / "vae", scaling_factor=1e7)
    large = replace(config, vae=tmp_path / "vae", out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"latents of images 0\.\.1 are not finite; dtype is 'float16'"):
        encode(large)
    encode(replace(large, out=tmp_path / "wide", dtype="float32"))


def test_weights_of_half_precision_are_computed_with_in_float32(config: EncodeConfig, tmp_path: Path) -> None:
    """A VAE published in float16 gives what the same numbers in float32 give."""
    for name, dtype in (("half", torch.float16), ("full", torch.float32)):
        _vae(tmp_path / name)
        path = tmp_path / name / _WEIGHTS
        save_file({key: tensor.half().to(dtype) for key, tensor in load_file(path).items()}, path)
        encode(replace(config, vae=tmp_path / name, out=tmp_path / f"{name}-latents"))
    half, full = (
        load_file(tmp_path / f"{name}-latents/shard-000000.safetensors") for name in ("half", "full")
    )
    assert torch.equal(half["latents"], full["latents"])


def _set(folder: Path, **changes: Any) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **changes}))


def test_folders_without_a_whole_vae_are_refused(
    config: EncodeConfig, vae: tuple[Path, AutoencoderKL], tmp_path: Path
) -> None:
    """Nothing but the safetensors file is loaded, nothing is left at random values, no store is begun."""

    def refused(message: str) -> None:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            encode(replace(config, vae=folder, out=tmp_path / "out"))
        assert str(folder) in str(caught.value)
        assert not (tmp_path / "out").exists()

    folder = tmp_path / "absent"
    refused(r"without config\.json; accepted is the folder of a diffusers AutoencoderKL")
    folder = tmp_path / "vae"
    shutil.copytree(vae[0], folder)
    (folder / _WEIGHTS).rename(folder / "aside")
    torch.save(load_file(folder / "aside"), folder / "diffusion_pytorch_model.bin")
    refused(f"without {_WEIGHTS}")
    tensors = load_file(folder / "aside")
    save_file({n: t for n, t in tensors.items() if n != "encoder.conv_in.bias"}, folder / _WEIGHTS)
    refused(r"does not fit its config\.json: missing encoder\.conv_in\.bias")
    save_file({**tensors, "encoder.more": torch.zeros(1)}, folder / _WEIGHTS)
    refused(r"does not fit its config\.json: unexpected encoder\.more")
    (folder / _WEIGHTS).write_bytes((folder / "aside").read_bytes()[:-8])
    refused("Unable to load weights")
    (folder / "aside").rename(folder / _WEIGHTS)
    _set(folder, latents_mean=[0.0] * 4)
    refused(r"config\.json: has latents_mean or latents_std, accepted is null")
    _set(folder, _class_name="VQModel")
    refused(r"holds a VQModel, accepted is an AutoencoderKL")
    (folder / "config.json").write_text("not json")
    refused("not JSON")


def test_options_that_cannot_work_are_refused(config: EncodeConfig, tmp_path: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "size is 7, accepted by this VAE are multiples of 2": {"size": 7},
        "size is 0, accepted is an integer >= 1": {"size": 0},
        "shard_size is 0, accepted is an integer >= 1": {"shard_size": 0},
        "batch_size is -1, accepted is an integer >= 1": {"batch_size": -1},
    }
    for message, change in refused.items():
        with pytest.raises(ValueError, match=f"encode: {message}"):
            encode(replace(config, out=tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_without_diffusers_the_extra_is_named(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"needs the extra `diffusers` \(pip install '\.\[diffusers\]'"):
        encode(config)


def test_reading_latents_does_not_import_diffusers(config: EncodeConfig) -> None:
    code = (
        "import sys, torch; from pathlib import Path; import ard.encoding; from ard.data import LatentStore; "
        f"LatentStore(Path({str(config.out)!r})).fetch(torch.arange(8), torch.zeros(8, dtype=torch.bool)); "
        "sys.exit('diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
