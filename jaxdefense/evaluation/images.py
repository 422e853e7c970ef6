"""Adversarial images as files: PNG of 8 bits, a CSV of what the model says of each, floats.

FOLDER/00042.png       the adversarial image of example 42, rounded inside its ball
FOLDER/images.csv      one row for each example, see `save_images`
FOLDER/images.npz      "x_adv" (N, H, W, C) float32 as the attack left it, "labels", "ids"
"""

import csv
import io
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdefense import distributed, extras, files, validate
from jaxdefense.evaluation.checks import check_grid, check_ids
from jaxdefense.evaluation.crafting import round_to_grid
from jaxdefense.evaluation.evaluator import Apply, Evaluator
from jaxdefense.types import HostArray, PyTree, Threat

LEVELS = 255
COLUMNS = (
    "id",
    "file",
    "label",
    "clean_prediction",
    "prediction",
    "fooled",
    "prediction_8bit",
    "fooled_8bit",
)


def save_images(
    folder: str | os.PathLike,
    apply: Apply,
    images: HostArray,
    labels: HostArray,
    x_adv: HostArray,
    threat: Threat,
    *,
    variables: PyTree = None,
    ids: HostArray | None = None,
) -> list[dict[str, Any]]:
    """Writes adversarial images as PNG, floats and a table of the verdicts before and after.

    A PNG holds steps of 1/255, and rounding may undo an attack or leave the ball: each pixel goes
    to the nearest step that lies inside the ball, and the model is asked again. PNGs are written of
    the images that differ from the clean ones; rows of all.

    Args:
      folder: new or empty.
      apply: (variables, images) -> logits, in eval mode.
      images: (N, H, W, C) of 8 bits, divided by 255; C is 1 or 3.
      labels: (N,) integers.
      x_adv: (N, H, W, C), a verdict's.
      threat: Linf, L2 or L1 with the bounds (0, 1), that the attacks obeyed.
      variables: `apply`'s first argument.
      ids: (N,) integers, which name the files; default the positions.

    Returns:
      The table's rows: {"id", "file" ("" without one), "label", "clean_prediction", "prediction",
      "fooled", "prediction_8bit", "fooled_8bit"}, the last two of the rounded image.

    Raises:
      ValueError: a folder that holds something, images off the grid of 8 bits, other bounds or
        shapes.

    >>> import tempfile
    >>> import numpy as np
    >>> from jaxdefense import threat
    >>> from jaxdefense.evaluation import save_images
    >>> x, x_adv = np.zeros((2, 2, 2, 1)), np.stack([np.zeros((2, 2, 1)), np.full((2, 2, 1), 0.3)])
    >>> apply = lambda _, x: x.reshape(len(x), -1)[:, :2] * np.array([[-1.0, 1.0]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = save_images(folder, apply, x, np.zeros(2, int), x_adv, threat.Linf(0.3))
    >>> [(row["file"], row["fooled"], row["fooled_8bit"]) for row in rows]
    [('', 0, 0), ('00001.png', 1, 1)]
    """
    with extras.required("train", __name__):
        from PIL import Image
    path = check_folder(folder)
    evaluator = Evaluator(apply, threat)
    images, x_adv = evaluator.check_images(images), np.asarray(x_adv, np.float32)
    labels, ids = np.asarray(labels), check_ids(ids, len(images))
    check_grid(images, threat, LEVELS)
    if tuple(threat.bounds) != (0.0, 1.0) or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"a PNG needs images (N, H, W, 1 or 3) in [0, 1], got {images.shape} in {threat.bounds}"
        )
    if x_adv.shape != images.shape:
        raise ValueError(f"x_adv has shape {x_adv.shape}, and images {images.shape}")
    inside = threat.rounded(jnp.asarray(x_adv), jnp.asarray(images, jnp.float32), LEVELS)
    rounded = round_to_grid(np.asarray(inside), threat, LEVELS)
    pixels = np.rint(rounded * LEVELS).astype(np.uint8)
    clean, before, after = (
        evaluator.logits(variables, x.astype(images.dtype)).argmax(-1)
        for x in (images, x_adv, rounded)
    )
    turned = np.any(x_adv != images.astype(np.float32), (1, 2, 3))
    rows = []
    for i, name in enumerate(ids):
        file = f"{name:05d}.png" if turned[i] else ""
        fooled = [int(prediction[i] != labels[i]) for prediction in (before, after)]
        values = (name, file, labels[i], clean[i], before[i], fooled[0], after[i], fooled[1])
        rows.append({k: v if k == "file" else int(v) for k, v in zip(COLUMNS, values, strict=True)})
        if file:
            png = io.BytesIO()
            Image.fromarray(pixels[i].squeeze(-1) if pixels.shape[-1] == 1 else pixels[i]).save(
                png, "PNG"
            )
            if distributed.is_writer():
                files.write_bytes(path / file, png.getvalue())
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if distributed.is_writer():
        files.write_arrays(path / "images.npz", x_adv=x_adv, labels=labels, ids=ids)
        files.write_text(path / "images.csv", table.getvalue())
    return rows


@distributed.read_by_writer
def check_folder(folder: str | os.PathLike) -> pathlib.Path:
    """The folder's path, if it is new or empty.

    Args:
      folder: where images are to be written.

    Raises:
      ValueError: it is a file or holds something.
    """
    path = validate.check_folder("the folder of images", folder)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: images go to a new folder")
    return path
