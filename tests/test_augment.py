import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxdefense.data import augment, make_augment, make_contrast_view

KEY = jax.random.key(0)
AUGMENTS = {
    "identity": augment.identity,
    "crop": augment.random_crop(padding=2),
    "flip": augment.random_flip(),
    "resized_crop": augment.random_resized_crop(),
    "jitter": augment.color_jitter(),
    "gray": augment.random_gray(),
    "all": augment.compose(
        augment.random_flip(),
        augment.random_crop(padding=1),
        augment.random_resized_crop(scale=(0.5, 1)),
        augment.color_jitter(brightness=0.9, hue=0.5),
        augment.random_gray(),
    ),
}
each = pytest.mark.parametrize("name", AUGMENTS)


def images(batch=16, size=8, channels=3, seed=0):
    return jax.random.uniform(jax.random.key(seed), (batch, size, size, channels))


def apply(fn, x, key=KEY):
    return np.asarray(jax.jit(fn)(key, x))


class TestContract:
    @each
    @pytest.mark.parametrize("shape", [(16, 8, 8, 3), (5, 7, 9, 1)])
    def test_keeps_shape_dtype_and_range(self, name, shape):
        x = jax.random.uniform(KEY, shape)
        y = jax.jit(AUGMENTS[name])(KEY, x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert 0 <= np.min(y) <= np.max(y) <= 1

    @each
    def test_is_a_function_of_the_key(self, name):
        x = images()
        y = apply(AUGMENTS[name], x)
        assert np.array_equal(y, apply(AUGMENTS[name], x))
        if name != "identity":
            assert not np.array_equal(y, apply(AUGMENTS[name], x, jax.random.key(1)))

    @each
    def test_with_keys_per_example_the_place_in_the_batch_does_not_matter(self, name):
        x, keys = images(), jax.random.split(KEY, 16)
        forward, backward = (apply(AUGMENTS[name], x[::d], keys[::d]) for d in (1, -1))
        np.testing.assert_allclose(forward, backward[::-1], atol=1e-6)

    @each
    def test_runs_inside_scan_and_pmap(self, name):
        devices = jax.local_device_count()
        x, keys = images(devices * 4).reshape(devices, 4, 8, 8, 3), jax.random.split(KEY, devices)
        fn = AUGMENTS[name]

        def steps(key, x):
            def body(carry, step):
                return carry, fn(jax.random.fold_in(key, step), x)

            return jax.lax.scan(body, None, jnp.arange(2))[1]

        y = np.asarray(jax.pmap(steps)(keys, x))
        expected = apply(fn, x[-1], jax.random.fold_in(keys[-1], 1))
        np.testing.assert_allclose(y[-1, 1], expected, atol=1e-6)

    @each
    def test_black_and_white_images_stay_finite(self, name):
        x = jnp.zeros((16, 8, 8, 3)).at[8:].set(1)
        assert np.all(np.isfinite(apply(AUGMENTS[name], x)))

    def test_compose_gives_each_its_own_randomness(self):
        x = images(64)
        twice = augment.compose(augment.random_flip(), augment.random_flip())
        same = np.all(apply(twice, x) == np.asarray(x), axis=(1, 2, 3))
        assert 10 < same.sum() < 54  # one key for both would give all 64
        assert np.array_equal(apply(augment.compose(), x), x)


class TestCropAndFlip:
    def test_a_crop_is_a_shift_with_black_borders(self):
        x = images(200, size=4)
        y = apply(augment.random_crop(padding=1), x)
        padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
        matches = np.stack([(shift == y).all((1, 2, 3)) for shift in shifts])
        assert np.all(matches.sum(0) == 1)
        assert np.all(matches.sum(1) > 8)  # each of nine shifts: 22 expected

    def test_flip_mirrors_a_share_p_of_the_images(self):
        x = images(400)
        y = apply(augment.random_flip(p=0.25), x)
        mirrored = (y == np.asarray(x)[:, :, ::-1]).all((1, 2, 3))
        assert np.all(mirrored | (y == np.asarray(x)).all((1, 2, 3)))
        assert 65 < mirrored.sum() < 135

    def test_certain_and_impossible(self):
        x = images()
        assert np.array_equal(apply(augment.random_flip(p=1), x), x[:, :, ::-1])
        assert np.array_equal(apply(augment.random_flip(p=0), x), x)
        assert np.array_equal(apply(augment.random_crop(padding=0), x), x)


class TestResizedCrop:
    def test_the_whole_image_is_the_image(self):
        whole = augment.random_resized_crop(scale=(1, 1), ratio=(1, 1))
        np.testing.assert_allclose(apply(whole, images()), images(), atol=1e-6)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 20), st.integers(1, 12), st.integers(0, 2**31))
    def test_interpolates_as_pillow_does(self, start, length, seed):
        line = np.random.default_rng(seed).random(32, np.float32)
        weights = augment._interpolation(jnp.array([float(start)]), jnp.array([float(length)]), 32)
        crop = Image.fromarray(line[None, start : start + length])
        expected = np.asarray(crop.resize((32, 1), Image.Resampling.BILINEAR))[0]
        np.testing.assert_allclose(np.asarray(weights[0]) @ line, expected, atol=1e-5)

    def test_crops_have_the_area_and_aspect_asked_for(self):
        # On a plane x = (row, column), the crop's corners can be read off its values.
        size, n = 64, 500
        ramp = (jnp.arange(size) + 0.5) / size
        plane = jnp.stack(jnp.meshgrid(ramp, ramp, indexing="ij"), -1)
        x = jnp.broadcast_to(plane[None], (n, size, size, 2))
        y = apply(augment.random_resized_crop(), x)
        # Values fall by length / size² from pixel to pixel, in the middle of the crop.
        height = (y[:, 40, 0, 0] - y[:, 24, 0, 0]) / 16 * size * size
        width = (y[:, 0, 40, 1] - y[:, 0, 24, 1]) / 16 * size * size
        np.testing.assert_allclose(height, np.round(height), atol=1e-2)
        area, aspect = height * width / size**2, width / height
        assert 0.18 < area.min() < 0.22
        assert 0.95 < area.max() < 1.02
        assert 0.72 < aspect.min() < 0.78
        assert 1.28 < aspect.max() < 1.38
        assert abs(area.mean() - 0.58) < 0.04  # uniform, but for large crops that do not fit
        assert abs(np.log(aspect).mean()) < 0.03
        top = y[:, 32, 0, 0] * size - height / 2  # of the middle, less half a crop
        assert top.min() > -2
        assert (top + height).max() < size + 2

    def test_what_never_fits_falls_back_to_the_centre(self):
        # A crop of the whole area with twice the height fits no square image.
        x = images(2, size=8)
        y = apply(augment.random_resized_crop(scale=(1, 1), ratio=(0.5, 0.5)), x)
        columns = augment._interpolation(jnp.array([2.0]), jnp.array([4.0]), 8)[0]
        expected = jnp.einsum("jw,bhwc->bhjc", columns, x, precision="highest")
        np.testing.assert_allclose(y, expected, atol=1e-6)


class TestColor:
    def certain(self, **strengths):
        zero = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "p": 1.0}
        return augment.color_jitter(**(zero | strengths))

    def test_no_strength_changes_nothing(self):
        np.testing.assert_allclose(apply(self.certain(), images()), images(), atol=1e-6)

    def test_p_zero_changes_nothing(self):
        assert np.array_equal(apply(augment.color_jitter(p=0), images()), images())

    def test_a_share_p_is_changed(self):
        changed = (apply(augment.color_jitter(p=0.8), images(300)) != images(300)).any((1, 2, 3))
        assert 215 < changed.sum() < 265

    def test_brightness_scales(self):
        x = images(200) * 0.4 + 0.1
        factor = apply(self.certain(brightness=0.4), x) / np.asarray(x)
        np.testing.assert_allclose(factor.min((1, 2, 3)), factor.max((1, 2, 3)), rtol=1e-5)
        assert 0.6 <= factor.min() < 0.63
        assert 1.37 < factor.max() <= 1.4001

    @pytest.mark.parametrize("kind", ["contrast", "saturation"])
    def test_blends_with_gray(self, kind):
        x = np.asarray(images(50)) * 0.5 + 0.25
        y = apply(self.certain(**{kind: 0.3}), jnp.asarray(x))
        gray = (x @ np.float32([0.2989, 0.587, 0.114]))[..., None]
        other = gray.mean((1, 2, 3), keepdims=True) if kind == "contrast" else gray
        direction = x - other
        factor = ((y - other) * direction).sum((1, 2, 3)) / (direction**2).sum((1, 2, 3))
        blend = factor[:, None, None, None] * direction + other
        np.testing.assert_allclose(y, np.clip(blend, 0, 1), atol=1e-5)
        assert np.all((factor > 0.699) & (factor < 1.301))
        assert np.ptp(factor) > 0.4

    def test_hue_turns_as_in_hsv(self):
        x = images(6, size=4)
        turns = np.float32([-0.5, -0.1, 0.0, 0.05, 0.3, 0.5])
        planes = augment._turn_hue(tuple(jnp.moveaxis(x, -1, 0)), jnp.asarray(turns))
        for image, turned, turn in zip(np.asarray(x), np.stack(planes, -1), turns):
            for rgb, found in zip(image.reshape(-1, 3), turned.reshape(-1, 3)):
                h, s, v = colorsys.rgb_to_hsv(*map(float, rgb))
                expected = colorsys.hsv_to_rgb((h + float(turn)) % 1, s, v)
                np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_the_order_of_the_changes_is_random(self):
        # Both orders of contrast and a clipped brightness, for one image under many keys.
        x = jnp.broadcast_to(images(1, seed=3), (200, 8, 8, 3))
        keys = jax.random.split(KEY, 200)

        def orders(key):
            return jax.random.permutation(jax.random.fold_in(key, 2), 4)

        order = np.asarray(jax.vmap(orders)(keys))
        assert len(np.unique(order, axis=0)) == 24
        y = apply(self.certain(brightness=0.8, contrast=0.8), x, keys)
        draws = jax.vmap(
            lambda k: jax.random.uniform(
                jax.random.fold_in(k, 0), (3,), minval=jnp.array([0.2, 0.2, 1]), maxval=1.8
            )
        )(keys)
        for row in range(50):
            image = np.asarray(x[row])
            for change in order[row]:
                gray = image @ np.float32([0.2989, 0.587, 0.114])
                other = {0: 0.0, 1: gray.mean()}.get(int(change))
                if other is not None:
                    f = float(draws[row, change])
                    image = np.clip(f * image + (1 - f) * other, 0, 1)
            np.testing.assert_allclose(y[row], image, atol=1e-5)

    def test_gray(self):
        x = images(300)
        y = apply(augment.random_gray(), x)
        gray = np.asarray(x) @ np.float32([0.2989, 0.587, 0.114])
        changed = np.abs(y - gray[..., None]).max((1, 2, 3)) < 1e-6
        assert 35 < changed.sum() < 85
        assert np.array_equal(y[~changed], np.asarray(x)[~changed])

    def test_one_channel_has_no_color(self):
        x = images(channels=1)
        np.testing.assert_allclose(apply(self.certain(saturation=0.9, hue=0.5), x), x, atol=1e-6)
        assert np.array_equal(apply(augment.random_gray(p=1), x), x)


class TestMake:
    NAMES = ("none", "crop", "flip", "crop_flip", "weak", "strong", "weak_digits", "strong_digits")

    @pytest.mark.parametrize("shape", [(8, 8, 8, 1), (8, 28, 28, 1), (8, 48, 64, 3)])
    @pytest.mark.parametrize("name", NAMES)
    def test_every_name_takes_images_of_every_size(self, name, shape):
        x = jax.random.uniform(KEY, shape)
        y = jax.eval_shape(make_augment(name), KEY, x)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)

    @pytest.mark.parametrize("name", ["crop", "crop_flip", "weak", "strong", "weak_digits"])
    def test_views_differ_from_the_image(self, name):
        x = images(8, 28, 1)
        changed = (apply(make_augment(name), x) != x).any((1, 2, 3))
        assert changed.sum() >= 7  # one crop in 49 is the image
        assert np.array_equal(apply(make_augment("none"), x), x)

    @pytest.mark.parametrize("size", [8, 32, 160])
    def test_a_crop_moves_by_an_eighth_of_the_size_at_most(self, size):
        x = jnp.zeros((100, size, size, 1)).at[:, size // 2, size // 2].set(1.0)
        y = apply(make_augment("crop"), x)[..., 0]
        moves = np.argwhere(y)[:, 1:] - size // 2
        assert np.abs(moves).max() == size // 8

    @pytest.mark.parametrize(
        ("name", "mirrored"),
        [("crop", False), ("crop_flip", True), ("weak_digits", False), ("flip", True)],
    )
    def test_only_what_is_called_so_flips(self, name, mirrored):
        x = jnp.zeros((200, 28, 28, 1)).at[:, 14, 10:18, 0].set(jnp.linspace(0.2, 1, 8)[None])
        row = apply(make_augment(name), x)[..., 0].max(1)
        falling = np.argmax(row, 1) < np.argmax(row > 0.19, 1) + 1
        assert falling.any() == mirrored

    @pytest.mark.parametrize(("dataset", "mirrored"), [("mnist", False), ("photographs", True)])
    def test_contrastive_views_of_digits_are_not_mirrored(self, dataset, mirrored):
        x = jnp.zeros((200, 28, 28, 1)).at[:, 14, 10:18, 0].set(jnp.linspace(0.2, 1, 8)[None])
        row = apply(make_contrast_view("weak", dataset), x)[..., 0].max(1)
        assert (np.argmax(row, 1) < np.argmax(row > 0.19, 1) + 1).any() == mirrored

    def test_unknown_names_list_the_nearest(self):
        with pytest.raises(ValueError, match="unknown augmentation 'crops'; nearest: crop"):
            make_augment("crops")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augment.random_crop(padding=-1), "padding must not be negative"),
        (lambda: augment.random_flip(p=1.5), "p must be a probability, got 1.5"),
        (lambda: augment.random_gray(p=-0.1), "p must be a probability"),
        (lambda: augment.random_resized_crop(scale=(0, 1)), "scale"),
        (lambda: augment.random_resized_crop(scale=(0.5, 1.1)), "scale"),
        (lambda: augment.random_resized_crop(ratio=(2, 1)), "ratio"),
        (lambda: augment.color_jitter(hue=0.6), "hue"),
        (lambda: augment.color_jitter(contrast=-1), "strengths must not be negative"),
        (lambda: augment.random_gray()(KEY, images(channels=2)), "1 or 3 channels, got 2"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
