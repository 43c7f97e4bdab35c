"""The embedded default: a small Fashion-MNIST teacher and students of it, a classifier, statistics of real
images (see MADE.md)."""

from pathlib import Path

ASSETS = Path(__file__).parent
