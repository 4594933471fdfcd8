"""Sources of images and labels, and how an image becomes a model's input."""

from __future__ import annotations

from moon.data.load import data_sha256, load_pixels, match_labels, split_validation, stream
from moon.data.preprocess import Preprocess
from moon.data.source import Item, Source, open_source

__all__ = [
    "Item",
    "Preprocess",
    "Source",
    "data_sha256",
    "load_pixels",
    "match_labels",
    "open_source",
    "split_validation",
    "stream",
]
