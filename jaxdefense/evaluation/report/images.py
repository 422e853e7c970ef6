"""Galleries: a record's examples as PNG images inside the page."""

import base64
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdefense import extras
from jaxdefense.evaluation.records import unpack_images

with extras.required("plots", __name__):
    from PIL import Image


class Picture(NamedTuple):
    """One image.

    Attributes:
      source: a data URI.
      text: what it shows, for those who cannot see it.
    """

    source: str
    text: str


class Gallery(NamedTuple):
    """Examples in columns.

    Attributes:
      attack: that made the adversarial images.
      titles: of the columns: the label, and what the model says of the adversarial image.
      rows: {"clean", "adversarial", "difference", perhaps "purified": pictures}.
      largest: change of a pixel in the difference's black and white.
    """

    attack: str
    titles: list[str]
    rows: dict[str, list[Picture]]
    largest: float

    @property
    def size(self) -> int:
        """Characters of all images."""
        return sum(len(picture.source) for row in self.rows.values() for picture in row)


def _encode(image: np.ndarray) -> str:
    """A PNG of (H, W, C) in [0, 1], as a data URI."""
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        buffer, "PNG", optimize=True
    )
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gallery(examples: Mapping[str, Any]) -> Gallery:
    """A record's examples: clean, adversarial, their difference and, where it is there, purified.

    In the difference grey is no change, black and white the largest of all.

    Args:
      examples: of an audit, or of the protocol "configured".
    """
    clean, moved = (unpack_images(examples[key]) for key in ("clean", "adversarial"))
    change = moved - clean
    largest = float(np.abs(change).max(initial=0))
    scaled = change / (2 * max(largest, 1e-6)) + 0.5
    kinds = {"clean": clean, "adversarial": moved, "difference": scaled}
    if "cleaned" in examples:
        kinds["purified"] = unpack_images(examples["cleaned"])
    rows = {
        kind: [
            Picture(_encode(image), f"{kind} image of class {label}")
            for image, label in zip(images, examples["labels"], strict=True)
        ]
        for kind, images in kinds.items()
    }
    pairs = zip(examples["labels"], examples["said"], strict=True)
    titles = [f"{label}, then {said}" for label, said in pairs]
    return Gallery(str(examples.get("attack", "the audit's attacks")), titles, rows, largest)
