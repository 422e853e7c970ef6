"""On-device augmentation: pure functions `(key, images) -> images` for use inside the jitted step.

    view = make("strong")
    images = view(key, images)

Images are (B, H, W, C) floats in [0, 1] and stay there. `key` is one typed key or one per example;
every example draws for itself. Factories take keyword-only hyper-parameters; `compose` chains.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdefense import registry
from jaxdefense.types import Array, Images, Key, example_keys, fold_in

Augment = Callable[[Key, Images], Images]
Planes = tuple[Array, ...]  # one (B, H, W) per channel

_DIGITS = ("digits", "mnist", "svhn_cropped")  # a mirrored digit is no digit
_LEAST_CROP = 0.5  # of a digit's area: a fifth of it, as of a photograph, is often no digit
_LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision weighs them


def identity(key: Key, images: Images) -> Images:
    """The images as they are.

    Args:
      key: not used.
      images: (B, H, W, C).
    """
    del key
    return images


def compose(*augments: Augment) -> Augment:
    """The augmentations one after another, each with randomness of its own.

    Args:
      *augments: in order.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxdefense.data import augment
    >>> view = augment.compose(augment.random_crop(padding=4), augment.random_flip())
    >>> view(jax.random.key(0), jnp.zeros((8, 32, 32, 3))).shape
    (8, 32, 32, 3)
    """

    def apply(key: Key, images: Images) -> Images:
        for i, augment in enumerate(augments):
            images = augment(fold_in(key, i), images)
        return images

    return apply


def random_crop(*, padding: int = 4) -> Augment:
    """A random shift by up to `padding` pixels each way; what comes in is black.

    Args:
      padding: pixels added on every side before a crop of the original size.

    Raises:
      ValueError: `padding` is negative.
    """
    if padding < 0:
        raise ValueError(f"padding must not be negative, got {padding}")

    def apply(key: Key, images: Images) -> Images:
        sides = (padding, padding)
        padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))

        def crop(key: Key, image: Array) -> Array:
            row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
            return jax.lax.dynamic_slice(image, (row, column, 0), images.shape[1:])

        return jax.vmap(crop)(example_keys(key, len(images)), padded)

    return apply


def random_flip(*, p: float = 0.5) -> Augment:
    """A horizontal mirror image with probability `p`.

    Args:
      p: in [0, 1].

    Raises:
      ValueError: `p` is outside [0, 1].
    """
    _check_probability(p)

    def apply(key: Key, images: Images) -> Images:
        return _where(_chosen(key, p, len(images)), images[:, :, ::-1], images)

    return apply


def random_resized_crop(
    *, scale: tuple[float, float] = (0.2, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Augment:
    """A random rectangle resized to the whole image, bilinear, as torchvision's RandomResizedCrop.

    As there, the first of ten (area, aspect) draws that fits the image counts, and if none does,
    the largest centred rectangle within `ratio`. A crop is never larger than the image, so that it
    is only enlarged and antialiasing has nothing to do.

    Args:
      scale: bounds of the crop's area as a share of the image's; drawn uniformly.
      ratio: bounds of width / height; its logarithm is drawn uniformly.

    Raises:
      ValueError: bounds not in order, a scale outside (0, 1], or a ratio that is not positive.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"need 0 < scale[0] <= scale[1] <= 1, got {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"need 0 < ratio[0] <= ratio[1], got {ratio}")

    def rectangle(key: Key, height: int, width: int) -> tuple[Array, Array, Array, Array]:
        draws = jax.random.uniform(key, (22,))
        area = height * width * (scale[0] + draws[:10] * (scale[1] - scale[0]))
        low, high = jnp.log(ratio[0]), jnp.log(ratio[1])
        aspect = jnp.exp(low + draws[10:20] * (high - low))
        w = jnp.round(jnp.sqrt(area * aspect))
        h = jnp.round(jnp.sqrt(area / aspect))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = jnp.argmax(fits)
        # No draw fits: the whole image, or what of it the bounds on the aspect allow.
        whole_w = min(width, round(height * ratio[1]))
        whole_h = min(height, round(width / ratio[0]))
        h = jnp.where(fits[first], h[first], whole_h)
        w = jnp.where(fits[first], w[first], whole_w)
        spare = jnp.stack([height - h, width - w])
        # The last float below 1 times spare + 1 may round up to spare + 1.
        corner = jnp.minimum(jnp.floor(draws[20:] * (spare + 1)), spare)
        top, left = jnp.where(fits[first], corner, spare // 2)
        return top, left, h, w

    def apply(key: Key, images: Images) -> Images:
        batch, height, width, _ = images.shape
        top, left, h, w = jax.vmap(lambda k: rectangle(k, height, width))(example_keys(key, batch))
        rows = _interpolation(top, h, height)
        columns = _interpolation(left, w, width)
        # Bilinear sampling is separable: one small matrix product for each direction.
        images = jnp.einsum("bih,bhwc->biwc", rows, images, precision="highest")
        images = jnp.einsum("bjw,biwc->bijc", columns, images, precision="highest")
        return jnp.clip(images, 0, 1)  # weights may add up to a little more than 1

    return apply


def color_jitter(
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    p: float = 0.8,
) -> Augment:
    """torchvision's ColorJitter with probability `p`: four changes in random order.

    Brightness blends with black, contrast with the image's mean gray, saturation with its gray
    image, each by a factor f uniform in [max(0, 1 - x), 1 + x] (x' = f x + (1 - f) other, clipped);
    the hue turns by a share of the circle uniform in [-hue, hue]. Images of one channel have
    neither saturation nor hue.

    Args:
      brightness: x of the brightness's factor.
      contrast: x of the contrast's factor.
      saturation: x of the saturation's factor.
      hue: the largest turn, a share of the circle in [0, 0.5].
      p: probability that an image is changed at all.

    Raises:
      ValueError: a negative strength, `hue` above 0.5, or `p` outside [0, 1].
    """
    _check_probability(p)
    strengths = (brightness, contrast, saturation)
    if min(strengths) < 0 or not 0 <= hue <= 0.5:
        raise ValueError(f"strengths must not be negative, hue in [0, 0.5]: {(*strengths, hue)}")

    def apply(key: Key, images: Images) -> Images:
        color = _check_channels(images) == 3
        batch = len(images)
        strength = jnp.asarray((brightness, contrast, saturation), images.dtype)

        def draw(key: Key) -> tuple[Array, Array, Array]:
            low, high = jnp.maximum(0, 1 - strength), 1 + strength
            factors = jax.random.uniform(fold_in(key, 0), (3,), images.dtype, low, high)
            turn = jax.random.uniform(fold_in(key, 1), (), images.dtype, -hue, hue)
            return factors, turn, jax.random.permutation(fold_in(key, 2), 4)

        factors, turns, orders = jax.vmap(draw)(example_keys(key, batch))
        if not color:
            factors = factors.at[:, 2].set(1)

        def change(planes: Planes, which: Array) -> tuple[Planes, None]:
            gray = _luma(planes)
            mean = gray.mean((1, 2), keepdims=True)
            # Three of the four changes are one blend, by a factor, with black, the mean or gray.
            factor = jnp.take_along_axis(factors, jnp.minimum(which, 2)[:, None], 1)[..., None]
            which = which[:, None, None]
            other = jnp.where(which == 1, mean, jnp.where(which == 2, gray, 0))
            blended = [jnp.clip(factor * plane + (1 - factor) * other, 0, 1) for plane in planes]
            turned = _turn_hue(planes, turns) if color and hue else planes
            return tuple(jnp.where(which == 3, t, b) for t, b in zip(turned, blended)), None

        # Planes and a loop: unrolled, or on whole images, XLA:CPU fuses it all and takes 10 times
        # as long.
        planes = tuple(jnp.moveaxis(images, -1, 0))
        planes, _ = jax.lax.scan(change, planes, orders.T)
        return _where(_chosen(fold_in(key, 1), p, batch), jnp.stack(planes, -1), images)

    return apply


def random_gray(*, p: float = 0.2) -> Augment:
    """The gray image (luma in every channel) with probability `p`.

    Args:
      p: in [0, 1].

    Raises:
      ValueError: `p` is outside [0, 1].
    """
    _check_probability(p)

    def apply(key: Key, images: Images) -> Images:
        _check_channels(images)
        gray = _luma(tuple(jnp.moveaxis(images, -1, 0)))[..., None]
        return _where(_chosen(key, p, len(images)), gray, images)

    return apply


def make(name: str) -> Augment:
    """The augmentation of a name, for images of any size.

    Args:
      name: 'none'; 'crop', a padded crop by an eighth of the size (4 pixels of 32); 'flip', a
        horizontal flip; 'crop_flip', both; 'weak', the same under the name it has in contrastive
        training; 'strong', a resized crop of a fifth of the area at least, a flip, colour jitter
        and random gray; 'weak_digits' and 'strong_digits', the same for digits and letters: no
        flip, and a resized crop of half the area at least.

    Raises:
      ValueError: unknown name.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxdefense import data
    >>> view = data.make_augment("crop_flip")
    >>> view(jax.random.key(0), jnp.zeros((8, 32, 32, 3))).shape
    (8, 32, 32, 3)
    """
    digits = random_resized_crop(scale=(_LEAST_CROP, 1.0))
    colours = (color_jitter(), random_gray())
    # The flip comes first: XLA:CPU fuses a reversal into the crop's gather, 20 times as slow.
    crop_flip = compose(random_flip(), _crop_an_eighth)
    views = {
        "none": identity,
        "crop": compose(_crop_an_eighth),
        "flip": random_flip(),
        "crop_flip": crop_flip,
        "weak": crop_flip,
        "strong": compose(random_resized_crop(), random_flip(), *colours),
        "weak_digits": compose(_crop_an_eighth),
        "strong_digits": compose(digits, *colours),
    }
    if name not in views:
        registry.raise_unknown("augmentation", name, views)
    return views[name]


def for_contrast(name: str, dataset: str) -> Augment:
    """The view 'weak' or 'strong' that suits a data set: digits are neither mirrored nor cut small.

    Args:
      name: 'weak' or 'strong'.
      dataset: its name; any but those of digits is taken for photographs.
    """
    return make(f"{name}_digits" if dataset in _DIGITS else name)


def _crop_an_eighth(key: Key, images: Images) -> Images:
    return random_crop(padding=min(images.shape[1:3]) // 8)(key, images)


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability, got {p}")


def _check_channels(images: Images) -> int:
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise ValueError(f"need images of 1 or 3 channels, got {channels}")
    return channels


def _chosen(key: Key, p: float, batch: int) -> Array:
    """(batch,) bool: True with probability `p`."""
    return jax.vmap(lambda k: jax.random.bernoulli(k, float(p)))(example_keys(key, batch))


def _where(chosen: Array, x: Array, y: Array) -> Array:
    """`x` for the chosen examples, `y` for the others."""
    return jnp.where(chosen[:, None, None, None], x, y)


def _interpolation(start: Array, length: Array, size: int) -> Array:
    """Weights (B, size, size) that enlarge `length` pixels from `start` to `size`, per example."""
    start, length = start[:, None], length[:, None]
    centres = (jnp.arange(size)[None] + 0.5) * length / size - 0.5  # half-pixel centres
    centres = start + jnp.clip(centres, 0, length - 1)  # the crop's edge is repeated
    return jnp.maximum(0, 1 - jnp.abs(centres[:, :, None] - jnp.arange(size)[None, None]))


def _luma(planes: Planes) -> Array:
    """(B, H, W): luma of three channels, or the one channel itself."""
    if len(planes) == 1:
        return planes[0]
    red, green, blue = (weight * plane for weight, plane in zip(_LUMA, planes))
    return red + green + blue


def _turn_hue(planes: Planes, turns: Array) -> Planes:
    """Red, green and blue with the hue turned by a share of the circle (B,), by HSV and back."""
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1 / jnp.where(chroma == 0, 1, chroma)
    sixths = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    sixths = sixths + 6 * turns[:, None, None]

    def plane(offset: int) -> Array:
        # A trapezium of the hue: value on top, value - chroma below.
        k = offset + sixths
        k = k - 6 * jnp.floor(k / 6)  # eight times as fast on the CPU as jnp.mod
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return plane(5), plane(3), plane(1)
