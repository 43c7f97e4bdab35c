"""Models through huggingface_hub's methods and diffusers' pipeline: one folder format, the same bits."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import randomise, tiny_teacher
from torch import Tensor

from ard.checkpoints import load_student, load_teacher, read_json
from ard.convert import ConvertConfig, convert
from ard.data import to_uint8
from ard.diffusion import Diffusion
from ard.models import ARDTransformer, DiT
from ard.pipeline import ARDPipeline
from ard.sampling import SampleConfig, run, sample


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}


def _same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def pipe(student: Path) -> ARDPipeline:
    pipe = ARDPipeline(ARDTransformer.from_pretrained(student))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def latent_pipe() -> ARDPipeline:
    """A student of 4 channels with a VAE that doubles the size and makes colours."""
    teacher = tiny_teacher(channels=4, input_size=14)
    teacher.diffusion = Diffusion()
    student = ARDTransformer.from_teacher(
        teacher, steps=2, history_layers=1, levels=[900, 500], gated_history=True
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(
        3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), latent_channels=4,
        norm_num_groups=4, scaling_factor=0.18215,
    )  # fmt: skip
    randomise(student, 1)
    return ARDPipeline(student.eval(), vae.eval())


# save_pretrained and from_pretrained


def test_a_folder_of_the_trainer_is_a_pretrained_model_and_the_other_way_round(
    tmp_path: Path, teacher: Path, student: Path
) -> None:
    """The same two files, byte for byte."""
    for model, folder in ((ARDTransformer, student), (DiT, teacher)):
        loaded = model.from_pretrained(folder)
        assert not loaded.training
        loaded.save_pretrained(tmp_path / folder.name)
        assert _files(tmp_path / folder.name) == _files(folder)
    model, diffusion = load_teacher(tmp_path / "teacher")
    assert diffusion.config == Diffusion("linear", "v").config
    trained = load_student(tmp_path / "student")[1]
    assert trained == load_student(student)[1]
    assert trained["grid"]


def test_a_teacher_without_its_process_is_not_saved(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="diffusion is None, accepted is the Diffusion"):
        teacher.save_pretrained(tmp_path / "t")
    assert not (tmp_path / "t" / "config.json").exists()
    teacher.diffusion = Diffusion("cosine", "x0")
    teacher.save_pretrained(tmp_path / "t")
    assert load_teacher(tmp_path / "t")[1].config == teacher.diffusion.config


def test_saving_over_a_folder_leaves_what_else_is_there(tmp_path: Path, student: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    ARDTransformer.from_pretrained(student).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def _cached(cache: Path, folder: Path) -> None:
    """`folder` as the Hub's own cache keeps the repository someone/model."""
    repository = cache / "models--someone--model"
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


def test_a_repository_loads_like_a_folder(tmp_path: Path, student: Path) -> None:
    """From the cache of downloads, so without a network."""
    _cached(tmp_path, student)
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = ARDTransformer.from_pretrained("someone/model", **options)
    assert _same(loaded, load_student(student)[0])
    with pytest.raises(ValueError, match="holds an ARDTransformer, wanted is a DiT"):
        DiT.from_pretrained("someone/model", **options)


def test_the_model_card_says_how_to_load_it(tmp_path: Path, student: Path) -> None:
    ARDTransformer.from_pretrained(student).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: ard" in card
    assert "ARDTransformer.from_pretrained(" in card


def test_pretrained_weights_that_do_not_fit_are_listed(tmp_path: Path, student: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(student, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["final_layers.2.linear.bias"]
    save_file({**weights, "extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing final_layers\.2\.linear\.bias; unexpected extra$"):
        ARDTransformer.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"no config\.json there"):
        ARDTransformer.from_pretrained(tmp_path)


def test_half_precision_keeps_the_times(student: Path) -> None:
    """999, 749.25, .. are no bfloat16 numbers: rounded, the student would be told other times."""
    loaded = ARDTransformer.from_pretrained(student, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.times.tolist() == [999.0, 749.25, 499.5, 249.75]
    assert loaded.float().times.tolist() == [999.0, 749.25, 499.5, 249.75]


# ARDPipeline


def test_the_pipeline_makes_the_images_of_sample(pipe: ARDPipeline) -> None:
    """For given noise and for a generator's, in every form of output."""
    labels = [3, 0, 7]
    noise = torch.randn((3, 1, 28, 28), generator=torch.Generator().manual_seed(5))
    expected = sample(pipe.student, noise, torch.tensor(labels))[:, -1]
    assert torch.equal(pipe(labels, latents=noise, output_type="latent").images, expected)

    def drawn(output_type: str) -> Any:
        return pipe(labels, generator=torch.Generator().manual_seed(5), output_type=output_type).images

    assert torch.equal(drawn("latent"), expected)
    unit = (expected / 2 + 0.5).clamp(0, 1)
    assert 0 < (unit == expected / 2 + 0.5).float().mean() < 1, "some values are clipped, not all"
    assert torch.equal(drawn("pt"), unit)
    assert np.array_equal(drawn("np"), unit.permute(0, 2, 3, 1).numpy())
    pictures = np.stack([np.asarray(picture) for picture in drawn("pil")])
    assert pictures.dtype == np.uint8
    # Both round; at a tie 127.5 x + 127.5 and 255 (x / 2 + 0.5) may go different ways.
    difference = np.abs(pictures.astype(int) - to_uint8(expected)[:, 0].numpy().astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 1e-3
    assert torch.equal(pipe(labels, latents=noise, output_type="pt", return_dict=False)[0], unit)


def test_images_of_a_class_come_one_after_the_other(pipe: ARDPipeline) -> None:
    noise = torch.randn(4, 1, 28, 28)
    expected = sample(pipe.student, noise, torch.tensor([2, 2, 5, 5]))[:, -1]
    for labels in ([2, 5], torch.tensor([2, 5])):
        images = pipe(labels, num_images=2, latents=noise, output_type="latent").images
        assert torch.equal(images, expected)
    assert len(pipe(4, num_images=3).images) == 3


def test_one_generator_per_image_makes_images_independent_of_the_batch(pipe: ARDPipeline) -> None:
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    both = pipe([1, 2], generator=[generator(8), generator(9)], output_type="latent").images
    alone = pipe([2], generator=[generator(9)], output_type="latent").images
    assert torch.allclose(both[1], alone[0], atol=1e-5)
    assert not torch.allclose(both[0], alone[0], atol=1e-2)


def test_latents_are_decoded_by_the_vae(latent_pipe: ARDPipeline) -> None:
    noise, labels = torch.randn(2, 4, 14, 14), [0, 9]
    latents = latent_pipe(labels, latents=noise, output_type="latent").images
    assert torch.equal(latents, sample(latent_pipe.student, noise, torch.tensor(labels))[:, -1])
    with torch.no_grad():
        decoded = latent_pipe.vae.decode(latents / 0.18215).sample
    assert decoded.shape == (2, 3, 28, 28)
    images = latent_pipe(labels, latents=noise, output_type="pt").images
    assert torch.equal(images, (decoded / 2 + 0.5).clamp(0, 1))
    assert latent_pipe(labels, latents=noise).images[0].mode == "RGB"


def test_the_command_and_the_pipeline_undo_what_encode_did(
    tmp_path: Path, latent_pipe: ARDPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scale and shift: the VAE is asked to decode z of (z - shift) * scale."""
    vae = copy.deepcopy(latent_pipe.vae)
    vae.register_to_config(shift_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    latent_pipe.student.save_pretrained(tmp_path / "student")
    asked, decode = [], AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: (asked.append(z), decode(self, z))[1])
    run(SampleConfig(tmp_path / "student", tmp_path / "latents", samples=10, latents=True))
    run(SampleConfig(tmp_path / "student", tmp_path / "images", samples=10, vae=tmp_path / "vae"))
    z = torch.from_numpy(np.load(tmp_path / "latents" / "samples.npz")["arr_0"]) / 0.18215 + 0.5
    assert torch.equal(torch.cat(asked), z)
    assert len(asked) == 2, "all at once takes too much memory"
    with torch.no_grad():
        wanted = to_uint8(decode(vae, z).sample).permute(0, 2, 3, 1)
    images = np.load(tmp_path / "images" / "samples.npz")["arr_0"]
    assert images.shape == (10, 28, 28, 3)
    assert np.abs(images.astype(int) - wanted.numpy().astype(int)).max() <= 1
    asked.clear()
    ARDPipeline(latent_pipe.student, vae)([1], latents=torch.zeros(1, 4, 14, 14))
    latents = sample(latent_pipe.student, torch.zeros(1, 4, 14, 14), torch.tensor([1]))[:, -1]
    assert torch.equal(asked[0], latents / 0.18215 + 0.5)
    assert read_json(tmp_path / "images" / "sample.json")["config"]["vae"] == str(tmp_path / "vae")


def test_latents_are_no_pictures(tmp_path: Path, latent_pipe: ARDPipeline, pipe: ARDPipeline) -> None:
    latent_pipe.student.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="4 channels, which are no picture; accepted are --vae"):
        run(SampleConfig(tmp_path / "student", tmp_path / "out", samples=2))
    latent_pipe.vae.save_pretrained(tmp_path / "vae")
    pipe.student.save_pretrained(tmp_path / "pixels")
    with pytest.raises(ValueError, match="of 4 latent channels, the student has 1"):
        run(SampleConfig(tmp_path / "pixels", tmp_path / "out", samples=2, vae=tmp_path / "vae"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_vae", [True, False])
def test_a_saved_pipeline_comes_back_bit_for_bit(
    tmp_path: Path, with_vae: bool, pipe: ARDPipeline, latent_pipe: ARDPipeline
) -> None:
    """Its student's folder is one of ours."""
    one = latent_pipe if with_vae else pipe
    one.save_pretrained(tmp_path)
    other = ARDPipeline.from_pretrained(tmp_path)
    assert _same(one.student, other.student)
    assert (other.vae is None) != with_vae
    noise = torch.randn(2, one.student.channels, *one.student.input_size)
    images = one([1, 2], latents=noise, output_type="pt").images
    assert torch.equal(images, other([1, 2], latents=noise, output_type="pt").images)
    assert _same(load_student(tmp_path / "student")[0], one.student)


def test_another_process_makes_the_same_images(tmp_path: Path, latent_pipe: ARDPipeline) -> None:
    """One that never made a pipeline; diffusers imports nothing because a folder names it."""
    latent_pipe.save_pretrained(tmp_path)
    noise = torch.randn(2, 4, 14, 14)
    images = latent_pipe([1, 2], latents=noise, output_type="pt").images
    torch.save({"noise": noise, "images": images}, tmp_path / "io.pt")
    script = (
        "import sys, torch; from ard.pipeline import ARDPipeline; folder = sys.argv[1]\n"
        "io = torch.load(folder + '/io.pt')\n"
        "made = ARDPipeline.from_pretrained(folder)([1, 2], latents=io['noise'], output_type='pt').images\n"
        "assert torch.equal(made, io['images'])"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=100)


def test_a_vae_can_join_a_pipeline_that_was_saved_without(
    tmp_path: Path, pipe: ARDPipeline, latent_pipe: ARDPipeline
) -> None:
    pipe.save_pretrained(tmp_path)
    assert ARDPipeline.from_pretrained(tmp_path, vae=latent_pipe.vae).vae is latent_pipe.vae


def test_a_student_is_converted_to_a_pipeline(tmp_path: Path, student: Path) -> None:
    convert(ConvertConfig(student, tmp_path / "pipe", to="diffusers"))
    assert read_json(tmp_path / "pipe" / "model_index.json")["_class_name"] == "ARDPipeline"
    loaded = ARDPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(loaded, DiffusionPipeline)
    assert _same(loaded.student, load_student(student)[0])
    convert(ConvertConfig(tmp_path / "pipe" / "student", tmp_path / "back"))
    assert _files(tmp_path / "back") == _files(student)


def test_a_pipeline_changes_its_dtype(tmp_path: Path, pipe: ARDPipeline) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = ARDPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == loaded.student.dtype == torch.bfloat16
    noise: Tensor = torch.randn(2, 1, 28, 28)
    half = loaded([1, 2], latents=noise, output_type="latent").images
    full = pipe([1, 2], latents=noise, output_type="latent").images
    assert half.dtype == torch.bfloat16
    assert ((half - full).norm() / full.norm()) < 0.05
    assert loaded.to(torch.float32)([1], output_type="latent").images.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"output_type": "jpg"}, "output_type is 'jpg', accepted are pil, np, pt, latent"),
     ({"num_images": 0}, "num_images is 0"),
     ({"num_images": 2.0}, r"num_images is 2\.0, accepted is an integer"),
     ({"num_images": 3, "generator": [torch.Generator()] * 2}, "generator has length 2, accepted are one"),
     ({"generator": [torch.Generator()] * 2}, "generator has length 2, .* each of the 1 images"),
     ({"class_labels": [10]}, r"labels are 10\.\.10, accepted are 0\.\.9"),
     ({"latents": torch.zeros(1, 1, 28, 27)}, "noise has shape"),
     ({"latents": torch.zeros(2, 1, 28, 28)}, "labels has shape")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(pipe: ARDPipeline, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1], **arguments})


def test_a_students_folder_is_a_pipeline(
    tmp_path: Path, student: Path, pipe: ARDPipeline, latent_pipe: ARDPipeline
) -> None:
    loaded = ARDPipeline.from_pretrained(student)
    assert _same(loaded.student, pipe.student)
    assert loaded.vae is None
    latent_pipe.student.save_pretrained(tmp_path)
    loaded = ARDPipeline.from_pretrained(tmp_path, vae=latent_pipe.vae, torch_dtype=torch.bfloat16)
    assert loaded.vae is latent_pipe.vae
    assert loaded.student.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"variant is given, but .* is a student's folder"):
        ARDPipeline.from_pretrained(student, variant="fp16")
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"pipe: no config.json there; accepted is .*pipe/student$"):
        load_student(tmp_path / "pipe")


def test_latents_without_a_vae_are_no_pictures(latent_pipe: ARDPipeline) -> None:
    alone = ARDPipeline(latent_pipe.student)
    with pytest.raises(ValueError, match="vae is None, and 4 channels are no picture"):
        alone([1])
    assert alone([1], output_type="latent").images.shape == (1, 4, 14, 14)


def test_diffusers_is_an_extra(tmp_path: Path, student: Path, teacher: Path) -> None:
    """Without it everything imports and teachers convert; what needs it says so."""
    script = f"""
import sys
import ard, ard.cli, ard.convert, ard.models, pathlib
assert "diffusers" not in sys.modules
sys.modules["diffusers"] = None  # what importing a package that is not there does
from ard.cli import main
main(["convert", "--weights", {str(teacher)!r}, "--out", {str(tmp_path / "d")!r}, "--to", "diffusers"])
try:
    import ard.pipeline
except ImportError as error:
    assert "needs diffusers: pip install '.[diffusers]'" in str(error)
main(["convert", "--weights", {str(student)!r}, "--out", {str(tmp_path / "p")!r}, "--to", "diffusers"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith("ard convert: a student --to diffusers needs diffusers"), done.stderr
    assert (tmp_path / "d" / "config.json").is_file()
    assert not (tmp_path / "p").exists()
