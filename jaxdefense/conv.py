"""Convolution with explicit gradients, for `nn.Conv(conv_general_dilated=conv)`.

XLA:CPU takes 3 to 190 times longer for the two gradients of a convolution inside a loop (`scan`,
`fori_loop`, `while_loop`) than outside, in the form that autodiff gives them: reversed windows,
batch and feature axes exchanged. The gradients here are forward convolutions and matrix products,
which XLA runs as fast inside a loop as outside. Seven rules choose between the forms; the figures
are ms on two cores of about 170 GFLOP/s together, or on one of 105 where that is said, jax 0.10.2
and 0.11.2 agreeing within the noise (`python experiments/benchmark conv` compares with autodiff's).

* One pixel. With a 1x1 kernel, forward pass and weight gradient are a matrix product of the pixels
  (32x32x64 -> 128, stride 2: forward 4.2 -> 1.6, weights 14 -> 2).
* First layers. With at most four channels in, and a stride or at least 32 outputs, the weight
  gradient is a matrix product of the image's patches (28x28x1 -> 16, 4x4, stride 2, 1,000 images:
  4.8 -> 3.4; 64 images on one core: 32x32x3 -> 64, 3x3 46 -> 20).
* Weights. Other weight gradients are one matrix product for each of the kernel's pixels where 8x8
  pixels or more went out (64 images, 3x3, on one core: 32x32x64 -> 64 969 -> 196; 8x8x256 -> 256
  130 -> 83; 32x32x64 -> 128, stride 2 147 -> 76; 32x32x3 -> 8 7.5 -> 2). Such products are too thin
  from fewer pixels, from one channel, or from 5 to 16 channels to at most 16: there it is a
  convolution of the images by the cotangent, the batch being the contracted channel
  (4x4x512 -> 512: 91, not 107; 28x28x1 -> 6, 5x5: 1.3, not 8).
* Several at once. With at most 16 outputs, XLA's vectors are nearly empty; there, of at most 16
  channels, up to 32 are made at once, of 2 to 8 neighbours in a row, by a kernel that holds the
  kernel as often, shifted, and a stride as many times as long. The wider kernel's zeros cost less
  than full vectors gain, and nothing is moved: the result is only reshaped (64 images on one core:
  28x28x1 -> 6, 5x5 9.3 -> 1.3; 14x14x16 -> 6, 5x5 4.3 -> 1.8; 32x32x8 -> 3, 3x3 6.2 -> 2.3;
  28x28x1 -> 16, 4x4, stride 2 2.8 -> 1.3).
* Phases. The gradient with respect to the images of a convolution with stride s is s*s ordinary
  convolutions of the cotangent, one for each pixel of an s x s block; where s divides the kernel
  they have one shape, hence are one convolution, whose channels are then spread over the block
  (14x14x16 -> 32, 4x4, stride 2, 1,000 images: 53 by dilating the cotangent, 8 so). Stride 1 is
  the case of one phase: the kernel flipped, in and out exchanged.
* Overlapping add. Where s does not divide the kernel, the phases waste work or fall apart, and
  where an output pixel has at most 64 values to give back, a matrix product is cheaper than their
  convolution (28x28x1 -> 16: 9 dilated, 6 by phases, 2 to 4 so), unless those are several at once
  (64 images on one core, 28x28x1 -> 6, 5x5: 22 so, 6 by phases). There every cotangent pixel is
  multiplied by the whole kernel, and the kernel-sized results are added up where they overlap
  (64 images, 3x3, stride 2: 32x32x64 -> 128 40 -> 21, 8x8x256 -> 512 14 -> 11).
* Tap by tap. A depthwise convolution (one kernel per channel) has no matrix product in it: it and
  both gradients are sums of kh kw products of shifted arrays, which XLA fuses into one pass
  (64x32x32x96, 3x3: forward 189 -> 8 to 21, images 247 -> 50, weights 48,782 -> 40 to 75, the
  machine not quite quiet).

Patches and overlapping results take kh kw / s^2 times the memory of the images.

Nobody has measured this on a GPU or TPU yet: there autodiff's form stays the default.
"""

import contextlib
import contextvars
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Pair = tuple[int, int]
Pads = tuple[Pair, Pair]

_VECTOR = 32  # outputs of a convolution at which XLA:CPU's matrix product has full vectors
_NARROW = 16  # most channels, in and out, of a convolution that makes several pixels at once
_NEIGHBOURS = 8  # most of those pixels
_FEW = 4  # most channels into a network's first convolution
_MANY_PIXELS = 64  # of a result, for a matrix product over them to be worth it
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_forced: contextvars.ContextVar[bool | None] = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def explicit_gradients(on: bool | None) -> Iterator[None]:
    """Inside this context `conv` is traced with explicit gradients, or with autodiff's.

    What counts is the moment of tracing: a function compiled before keeps its form.

    Args:
      on: True or False for every backend; None for the default, True on the CPU only.
    """
    token = _forced.set(on)
    try:
        yield
    finally:
        _forced.reset(token)


def is_explicit() -> bool:
    """Whether convolutions traced now get explicit gradients: on the CPU, or as the switch says."""
    forced = _forced.get()
    return jax.default_backend() == "cpu" if forced is None else forced


def covers(
    lhs: Any, rhs: Any, pads: Sequence[Pair], feature_group_count: int, preferred_element_type: Any
) -> bool:
    """Whether an undilated convolution in `conv`'s layout has explicit gradients.

    Args:
      lhs: images (B, H, W, C), or their shape and dtype.
      rhs: kernels (kh, kw, C, K), or their shape and dtype.
      pads: edges of each side.
      feature_group_count: groups of channels.
      preferred_element_type: of the result.
    """
    if len(lhs.shape) != 4 or lhs.dtype != rhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return False
    depthwise = feature_group_count == lhs.shape[3] == rhs.shape[3] > 1
    # No negative padding, nothing empty; what does not fit is refused by `jax.lax` in its words.
    channels = rhs.shape[2] * feature_group_count == lhs.shape[3]
    fits = (
        channels
        and 0 not in (*lhs.shape, *rhs.shape)
        and all(
            lo >= 0 and hi >= 0 and size + lo + hi >= k
            for size, k, (lo, hi) in zip(lhs.shape[1:3], rhs.shape[:2], pads)
        )
    )
    same_type = preferred_element_type in (None, lhs.dtype)
    return fits and same_type and (feature_group_count == 1 or depthwise)


def conv(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[Pair],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """`jax.lax.conv_general_dilated`, with gradients that XLA:CPU runs fast inside loops.

        y[n, i, j, o] = sum_{a, b, c} x[n, i s + a - lo, j s + b - lo, c] w[a, b, c, o]

    Two-dimensional, undilated convolutions of floats in the layout of `flax.linen` (images
    (B, H, W, C), kernels (kh, kw, C, K)), ungrouped or depthwise (kernels (kh, kw, 1, C) in C
    groups), get explicit gradients; all others, and every one on another backend than the CPU
    unless `explicit_gradients(True)` says so, are passed on to `jax.lax` unchanged. Explicit
    gradients can be differentiated again, in reverse mode only: `jax.jvp` needs
    `explicit_gradients(False)`, and so does a `jax.shard_map` whose `check_vma` is on (under `pmap`
    or `check_vma=False` they work).

    Args:
      lhs: images (B, H, W, C).
      rhs: kernels (kh, kw, C, K), or (kh, kw, 1, C) in C groups.
      window_strides: as in `jax.lax.conv_general_dilated`, as are all that follow.
      padding: "SAME", "VALID" or a pair of edges for each side.
      lhs_dilation: of the images.
      rhs_dilation: of the kernels.
      dimension_numbers: the layout.
      feature_group_count: groups of channels.
      batch_group_count: groups of images.
      precision: of the products.
      preferred_element_type: of the result.

    Returns:
      The convolution, of lhs's dtype (`preferred_element_type` if given). Sums of products of
      bfloat16 are taken in float32 and rounded once. A NaN or infinity among the images may spoil
      pixels beside those whose windows hold it, where several are made at once.
    """
    in_layout = lhs.ndim == 4 and (
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
    )
    undilated = all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    plain = undilated and batch_group_count == 1 and len(window_strides) == 2
    if is_explicit() and in_layout and plain:
        edges = padding
        if isinstance(edges, str):
            edges = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, edges)
        pads = tuple((int(lo), int(hi)) for lo, hi in edges)
        if len(pads) == 2 and covers(lhs, rhs, pads, feature_group_count, preferred_element_type):
            strides = (int(window_strides[0]), int(window_strides[1]))
            if feature_group_count > 1:
                return _depthwise(lhs, rhs, strides, pads)
            return _conv(lhs, rhs, strides, pads, precision)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: Array, w: Array, strides: Pair, pads: Pads, precision: Any) -> Array:
    if w.shape[:2] == (1, 1):
        patches = _patches(x, w.shape[:2], strides, pads)
        return _dot(patches, w[0, 0], (3, 0), precision)
    if _is_narrow(w):
        return _several_at_once(x, w, strides, pads, precision)
    return _lax_conv(x, w, strides, pads, precision)


def _lax_conv(x: Array, w: Array, strides: Pair, pads: Any, precision: Any) -> Array:
    return lax.conv_general_dilated(
        x, w, strides, pads, dimension_numbers=_LAYOUT, precision=precision
    )


def _forward(x: Array, w: Array, strides: Pair, pads: Pads, precision: Any) -> tuple:
    return _conv(x, w, strides, pads, precision), (x, w)


def _backward(strides: Pair, pads: Pads, precision: Any, saved: tuple, dy: Array) -> tuple:
    x, w = saved
    (kh, kw, c, _), size = w.shape, x.shape[1:3]
    several = strides == (1, 1) and _is_narrow(w)
    if (kh * kw * c <= 64 and not several) or kh % strides[0] or kw % strides[1]:
        wide = jnp.promote_types(dy.dtype, jnp.float32)
        z = jnp.tensordot(dy, w, (3, 3), precision=precision, preferred_element_type=wide)
        dx = _overlapping_add(lambda a, b: z[:, :, :, a, b], (kh, kw), strides, pads, size)
        dx = dx.astype(dy.dtype)
    else:
        dx = _phases(dy, w, strides, pads, size, precision)
    return dx, _weight_gradient(x, dy, w, strides, pads, precision)


_conv.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: Array, w: Array, strides: Pair, pads: Pads) -> Array:
    """y[n, i, j, c] = sum_{a, b} x[n, i s + a - lo, j s + b - lo, c] w[a, b, 0, c]."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    taps = _taps(x.astype(wide), w.shape[:2], strides, pads)
    kernel = w.astype(wide).reshape(-1, 1, 1, 1, w.shape[3])
    products = (tap * k for tap, k in zip(taps, kernel))
    return reduce(operator.add, products).astype(x.dtype)


def _depthwise_forward(x: Array, w: Array, strides: Pair, pads: Pads) -> tuple:
    return _depthwise(x, w, strides, pads), (x, w)


def _depthwise_backward(strides: Pair, pads: Pads, saved: tuple, dy: Array) -> tuple:
    x, w = saved
    window, wide = w.shape[:2], jnp.promote_types(x.dtype, jnp.float32)
    dy, kernel = dy.astype(wide), w.astype(wide).reshape(*window, 1, 1, 1, -1)
    dx = _overlapping_add(lambda a, b: dy * kernel[a, b], window, strides, pads, x.shape[1:3])
    taps = _taps(x.astype(wide), window, strides, pads)
    dw = jnp.stack([jnp.sum(tap * dy, (0, 1, 2)) for tap in taps])
    return dx.astype(x.dtype), dw.reshape(w.shape).astype(w.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _by_patches(w: Array, strides: Pair) -> bool:
    first = w.shape[2] <= _FEW and (max(strides) > 1 or w.shape[3] >= _VECTOR)
    return w.shape[:2] == (1, 1) or first


def _dot(a: Array, b: Array, axes: Any, precision: Any) -> Array:
    """`jnp.tensordot`, with sums in float32 at least."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    y = jnp.tensordot(a, b, axes, precision=precision, preferred_element_type=wide)
    return y.astype(a.dtype)


def _taps(x: Array, window: Sequence[int], strides: Pair, pads: Pads) -> list[Array]:
    """What each output pixel sees of x at each of the kernel's pixels: kh * kw of (B, n, m, C)."""
    (kh, kw), (sh, sw) = window, strides
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    n, m = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    return [
        x[:, a : a + (n - 1) * sh + 1 : sh, b : b + (m - 1) * sw + 1 : sw]
        for a in range(kh)
        for b in range(kw)
    ]


def _patches(x: Array, window: Sequence[int], strides: Pair, pads: Pads) -> Array:
    """The windows of x that each output pixel sees: (B, n, m, kh * kw * C)."""
    return jnp.concatenate(_taps(x, window, strides, pads), axis=-1)


def _is_narrow(w: Array) -> bool:
    return max(w.shape[2:]) <= _NARROW


def _several_at_once(x: Array, w: Array, strides: Pair, pads: Pads, precision: Any) -> Array:
    """The convolution, n neighbours of a row at once: n K outputs of a kernel n - 1 strides wider.

    Its result is that of the convolution, reshaped: nothing is moved.
    """
    (kh, kw, c, k), (sh, sw), (rows, (left, right)) = w.shape, strides, pads
    width = x.shape[2]
    seen = (width + left + right - kw) // sw + 1
    n = min(1 << (_VECTOR // k).bit_length() - 1, _NEIGHBOURS)
    steps = -(-seen // n)
    shifts = [((0, 0), (sw * i, sw * (n - 1 - i)), (0, 0), (0, 0)) for i in range(n)]
    wide = jnp.stack([jnp.pad(w, shift) for shift in shifts], 3).reshape(kh, -1, c, n * k)
    right = (steps * n - 1) * sw + kw - width - left
    x, edges = _cut(x, (rows, (left, right)))
    y = _lax_conv(x, wide, (sh, n * sw), edges, precision)
    return y.reshape(*y.shape[:2], steps * n, k)[:, :, :seen]


def depth_to_space(x: Array, block: Pair) -> Array:
    """Channels as s x t blocks of pixels: (B, H, W, s t C) -> (B, s H, t W, C)."""
    (b, h, w, c), (s, t) = x.shape, block
    x = x.reshape(b, h, w, s, t, c // (s * t)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, s * h, t * w, c // (s * t))


def _cut(x: Array, edges: Sequence[Pair]) -> tuple[Array, list[Pair]]:
    """x without the rows and columns that negative padding removes, and the padding left to do.

    XLA:CPU reads beyond the array in a convolution with negative padding (openxla/xla#48713; jax
    0.10.2 and 0.11.2). Autodiff asks for one where the padding is as large as the kernel.
    """
    if any(size + min(lo, 0) + min(hi, 0) < 0 for size, (lo, hi) in zip(x.shape[1:3], edges)):
        kept = [(0, 0), (0, 0)]  # what is removed reaches into the padding: no window saw a pixel
        done = [(lo, hi, 0) for lo, hi in edges]
    else:
        kept = [(max(lo, 0), max(hi, 0)) for lo, hi in edges]
        done = [(min(lo, 0), min(hi, 0), 0) for lo, hi in edges]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *done, (0, 0, 0)))
    return x, kept


def _weight_gradient(
    x: Array, dy: Array, w: Array, strides: Pair, pads: Pads, precision: Any
) -> Array:
    """dw[a, b, c, o] = sum_{n, i, j} x[n, i s + a - lo, j s + b - lo, c] dy[n, i, j, o]."""
    if _by_patches(w, strides):
        patches = _patches(x, w.shape[:2], strides, pads)
        return _dot(patches, dy, ((0, 1, 2), (0, 1, 2)), precision).reshape(w.shape)
    thick = 1 < w.shape[2] <= _FEW or not _is_narrow(w)
    if thick and dy.shape[1] * dy.shape[2] >= _MANY_PIXELS:
        taps = _taps(x, w.shape[:2], strides, pads)
        dw = jnp.stack([_dot(tap, dy, ((0, 1, 2), (0, 1, 2)), precision) for tap in taps])
        return dw.reshape(w.shape)
    # The cotangent's pixels are s apart over the image; rows that no window reached are cut off.
    edges = [
        (lo, k + (n - 1) * s - size - lo)
        for k, n, s, size, (lo, _) in zip(w.shape, dy.shape[1:3], strides, x.shape[1:3], pads)
    ]
    x, edges = _cut(x, edges)
    dw = conv(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        edges,
        rhs_dilation=strides,
        dimension_numbers=_LAYOUT,
        precision=precision,
    )
    return dw.transpose(1, 2, 0, 3)


def _blocks(size: Pair, strides: Pair, pads: Pads) -> tuple[list[int], list[int], list[int]]:
    """How the padded image's s x s blocks cover the image: blocks before, pixels cut, blocks."""
    before = [lo // s for (lo, _), s in zip(pads, strides)]
    cut = [lo % s for (lo, _), s in zip(pads, strides)]
    count = [-(-(n + c) // s) for n, c, s in zip(size, cut, strides)]
    return before, cut, count


def _phases(dy: Array, w: Array, strides: Pair, pads: Pads, size: Pair, precision: Any) -> Array:
    """dx by one convolution: with a = r + s b, dx[s q + r - lo] = sum_b dy[q - b] w[r + s b]."""
    (kh, kw, c, k), (sh, sw) = w.shape, strides
    before, cut, count = _blocks(size, strides, pads)
    taps = (kh // sh, kw // sw)
    kernel = w.reshape(taps[0], sh, taps[1], sw, c, k)[::-1, :, ::-1]
    kernel = kernel.transpose(0, 2, 5, 1, 3, 4).reshape(*taps, k, sh * sw * c)
    edges = [(t - 1 - b, q - n + b) for t, b, q, n in zip(taps, before, count, dy.shape[1:3])]
    dy, edges = _cut(dy, edges)
    z = conv(dy, kernel, (1, 1), edges, dimension_numbers=_LAYOUT, precision=precision)
    return _crop(depth_to_space(z, strides), cut, size)


def _overlapping_add(
    tap: Callable[[int, int], Array], window: Pair, strides: Pair, pads: Pads, size: Pair
) -> Array:
    """dx[s i + a - lo] += z[i, a], phase by phase, of z[:, a, b] = tap(a, b), (B, n, m, C)."""
    (kh, kw), (sh, sw) = window, strides
    before, cut, count = _blocks(size, strides, pads)

    def shifted(a: int, b: int) -> Array:
        z, low = tap(a, b), (a // sh - before[0], b // sw - before[1])
        edges = [(lo, q - n - lo, 0) for lo, q, n in zip(low, count, z.shape[1:3])]
        return lax.pad(z, jnp.zeros((), z.dtype), ((0, 0, 0), *edges, (0, 0, 0)))

    def phase(r: int, t: int) -> Array:
        # Where the stride is larger than the kernel a phase has no tap: nothing was seen there.
        taps = [shifted(a, b) for a in range(r, kh, sh) for b in range(t, kw, sw)]
        return sum(taps[1:], start=taps[0]) if taps else jnp.zeros_like(shifted(0, 0))

    rows = [jnp.stack([phase(r, t) for t in range(sw)], axis=3) for r in range(sh)]
    dx = jnp.stack(rows, axis=2)
    return _crop(dx.reshape(-1, count[0] * sh, count[1] * sw, dx.shape[-1]), cut, size)


def _crop(x: Array, start: Sequence[int], size: Pair) -> Array:
    return x[:, start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
