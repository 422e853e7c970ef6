"""One encoded image to an array of the set's shape: decoded, converted and resized by Pillow."""

import io
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

# What each of Pillow's modes of 8 bits holds: colour or not, and transparency or not.
_COLOUR = {"RGB": True, "RGBA": True, "P": True, "CMYK": True, "YCbCr": True}
_GREY = {"L": False, "LA": False, "1": False}
_ALPHA = ("RGBA", "LA")
RESIZE = "scaled to cover {}x{} (Pillow's bilinear filter, antialiased) and cropped at the centre"


class Header(NamedTuple):
    """What an image file says of itself before it is decoded.

    Attributes:
      size: (height, width) in pixels.
      colour: False for grey.
      alpha: whether it has transparency.
    """

    size: tuple[int, int]
    colour: bool
    alpha: bool


def read_header(encoded: bytes | IO[bytes]) -> Header:
    """Size and kind of an image, which is not decoded.

    Args:
      encoded: a PNG or JPEG file, or its content.

    Raises:
      ValueError: no image, or one of another depth than 8 bits.
    """
    with _open(encoded) as image:
        colour = {**_COLOUR, **_GREY}.get(image.mode)
        if colour is None:
            raise ValueError(f"images must have 8 bits a channel, this one is of mode {image.mode}")
        alpha = image.mode in _ALPHA or "transparency" in image.info
        return Header((image.height, image.width), colour, alpha)


def decode(encoded: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """An encoded image as (H, W, C) uint8.

    Grey becomes three equal channels where C is 3; transparency is dropped. An image of another
    size is scaled so that it covers H x W and cropped at the centre.

    Args:
      encoded: the content of a PNG or JPEG file.
      shape: (H, W, C), C 1 or 3.

    Raises:
      ValueError: no image, a damaged one, or a colour image where C is 1.

    >>> import io
    >>> from PIL import Image
    >>> from jaxdefense.data import decoding
    >>> file = io.BytesIO()
    >>> Image.new("L", (40, 20), 128).save(file, "PNG")
    >>> decoding.decode(file.getvalue(), (8, 8, 3)).shape
    (8, 8, 3)
    """
    height, width, channels = shape
    header = read_header(encoded)
    if header.colour and channels == 1:
        raise ValueError("a colour image in a set of grey ones")
    with _open(encoded) as image:
        mode = "RGB" if channels == 3 else "L"
        try:
            if header.alpha:
                image = image.convert("RGBA")  # Pillow warns of transparent palettes otherwise
            converted = image if image.mode == mode else image.convert(mode)
            if header.size != (height, width):
                converted = ImageOps.fit(converted, (width, height), Image.Resampling.BILINEAR)
            return np.asarray(converted).reshape(shape)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"damaged image: {error}") from error


def parse_size(size: int | list[int] | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) of a size that may be one number.

    Args:
      size: pixels: one number for a square, (height, width), or None.

    Raises:
      ValueError: anything else.

    >>> from jaxdefense.data import decoding
    >>> decoding.parse_size(64)
    (64, 64)
    """
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size must be pixels, one number or (height, width), got {size!r}")
    return sides


def _open(encoded: bytes | IO[bytes]) -> Image.Image:
    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        return Image.open(file, formats=("PNG", "JPEG"))
    except Image.UnidentifiedImageError as error:
        raise ValueError("no PNG or JPEG image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"damaged image: {error}") from error
