"""PyTorch's weights: golden state dicts of real PyTorch networks, and every way to be wrong.

CI has no torch: the golden files were made by tests/torch_nets.py, and what needs torch is skipped
without it.
"""

import importlib
import json
import logging
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxdefense import evaluation, models, threat
from jaxdefense.models import zoo
from jaxdefense.models.torch import _USUAL

GOLDEN = pathlib.Path(__file__).parent / "golden" / "torch"
NAMES = {"lenet_unpadded": "lenet", "resnet_imagenet": "resnet"}
FIELDS = {
    "cnn": {"width": 0.25},
    "lenet_unpadded": {"padding": 0},
    "mnist_net": {"width": 2, "bn": True},
    "preact_resnet": {"width": 1, "final_norm": True},
    "resnet": {"depth": 18, "width": 1, "stem": "cifar"},
    "resnet_imagenet": {"depth": 18, "stem": "imagenet"},
    "vgg": {"depth": 11, "width": 1},
    "mobilenet": {"width": 1 / 16},
}


def golden(name):
    """(state dict, images (B, C, H, W), logits) that PyTorch gave."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        held = dict(file)
    state, start = {}, 0
    for key, shape in json.loads(held["names"].item()).items():
        size = int(np.prod(shape))
        state[key] = held["state"][start : start + size].reshape(shape).astype(np.float32)
        start += size
    assert start == len(held["state"])
    return state, held["pixels"].astype(np.float32) / 255, held["logits"]


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.npz")))
def test_logits_are_pytorchs(name):
    state, images, logits = golden(name)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2 * np.abs(logits).max() ** 0.5
    loaded = models.from_torch(
        NAMES.get(name, name), state, images=images, logits=logits, tolerance=2e-5
    )
    for field, value in FIELDS.get(name, {}).items():
        assert getattr(loaded.module, field) == value
    assert loaded.meta["image_shape"] == (*images.shape[2:], images.shape[1])


def cnn():
    """The smallest golden network and what it needs for a check."""
    state, images, logits = golden("cnn")
    return state, {"images": images, "logits": logits}


def test_a_wrong_function_is_refused_though_names_and_shapes_fit():
    state, check = cnn()
    with pytest.raises(ValueError, match=r"logits differ by up to 0\.1,"):
        models.from_torch("cnn", state, **{**check, "logits": check["logits"] + 0.1})
    with pytest.raises(ValueError, match="shape"):
        models.from_torch("cnn", state, **{**check, "logits": check["logits"][:, :3]})
    with pytest.raises(ValueError, match="both images and their logits"):
        models.from_torch("cnn", state, images=check["images"])


def test_a_missing_normalisation_is_named():
    state, check = cnn()
    mean, std = _USUAL[1][0]
    normalised = models.from_torch("cnn", state, mean=mean, std=std)
    images = check["images"].transpose(0, 2, 3, 1)
    logits = normalised.predict(images)
    with pytest.raises(ValueError, match=r"with mean=\(0\.1307,\), std=\(0\.3081,\), bn_eps=1e-05"):
        models.from_torch("cnn", state, images=images, logits=logits)
    again = models.from_torch("cnn", state, mean=mean, std=std, images=images, logits=logits)
    assert again.meta["difference"] == 0


def test_small_logits_are_checked_as_closely_as_large_ones():
    """Of an untrained network, or one with a small head, a wrong function moves them little."""
    state, check = cnn()
    head = list(state)[-2:]
    small = {k: 0.01 * v if k in head else v for k, v in state.items()}
    mean, std = _USUAL[1][0]
    logits = models.from_torch("cnn", small, mean=mean, std=std).predict(
        check["images"].transpose(0, 2, 3, 1)
    )
    assert np.abs(logits).max() < 1
    with pytest.raises(ValueError, match=r"with mean=\(0\.1307,\)"):
        models.from_torch("cnn", small, images=check["images"], logits=logits)


def test_what_cannot_be_checked_is_refused_before_the_check():
    state, check = cnn()
    with pytest.raises(ValueError, match=r"images in \[0, 1\] for the check.* to 254"):
        models.from_torch("cnn", state, images=255 * check["images"], logits=check["logits"])
    with pytest.raises(ValueError, match="the logits to check with are not finite"):
        models.from_torch("cnn", state, **{**check, "logits": np.nan * check["logits"]})
    key = next(iter(state))
    with pytest.raises(ValueError, match=f"values that are not finite: {re.escape(key)}$"):
        models.from_torch("cnn", {**state, key: np.full_like(state[key], np.inf)})


def test_buffers_that_normalise_become_the_network_s():
    state, _, _ = golden("resnet")
    assert state["module.mu"].shape == (1, 3, 1, 1)
    loaded = models.from_torch("resnet", state)
    np.testing.assert_allclose(loaded.module.mean, _USUAL[3][1][0], atol=1e-3)
    np.testing.assert_allclose(loaded.module.std, _USUAL[3][1][1], atol=1e-3)
    assert models.from_torch("resnet", state, mean=None, std=None).module.mean is None


def test_another_eps_of_batchnorm_goes_into_the_variances_and_is_named_where_it_is_forgotten():
    state, images, _ = golden("mnist_net")
    images = images.transpose(0, 2, 3, 1)
    right = models.from_torch("mnist_net", state, bn_eps=1e-3)
    var = right.variables["batch_stats"]["bn1"]["var"]
    np.testing.assert_allclose(var + 1e-5, state["1.running_var"] + 1e-3, rtol=1e-6)
    with pytest.raises(ValueError, match=r"bn_eps=0\.001 they agree"):
        models.from_torch(
            "mnist_net", state, images=images, logits=right.predict(images), tolerance=1e-5
        )


def test_what_is_missing_or_left_over_or_of_another_shape_is_listed():
    state, _, _ = golden("preact_resnet")
    state["layer1.0.conv1.scores"] = np.zeros(3)
    state["layer9.0.conv1.weight"] = state.pop("layer1.0.conv1.weight")
    state["layer2.0.bn1.bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match="cannot take") as error:
        models.from_torch("preact_resnet", state)
    said = str(error.value)
    assert "missing: params/stage1_block1/conv1/kernel" in said
    assert "params/stage2_block1/bn1/bias has shape (7,), not (1,)" in said
    assert "left over: layer1.0.conv1.scores, layer9.0.conv1.weight" in said


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("cnn", {"9.weight": np.zeros((3, 10), np.float32)}, "3 linear layers .5, 7, 9., not 2"),
        ("lenet", {}, "cannot take"),
        ("resnet", {}, "no ResNet-18, -34 or -50"),
        ("wide_resnet", {}, r"no WideResNet with layers block1\.layer\.0\.conv1"),
        ("mobilenet", {}, "no MobileNetV2.*torchvision's"),
        ("vgg", {}, "no VGG of 2 convolutions"),
        ("resnett", {}, "nearest: resnet"),
    ],
)
def test_another_network_is_said_to_be_one(name, changes, match):
    with pytest.raises(ValueError, match=match):
        models.from_torch(name, {**cnn()[0], **changes})


def test_wrappings_and_files(tmp_path):
    state, check = cnn()
    wrapped = {"epoch": 3, "state_dict": {f"module.model.{k}": v for k, v in state.items()}}
    wrapped["optimizer"] = {"state": {0: {"step": 1}}, "param_groups": []}
    assert models.from_torch("cnn", wrapped, **check).meta["difference"] < 1e-5
    with pytest.raises(ValueError, match="several state dicts: give one of 'last', 'best'"):
        models.from_torch("cnn", {"last": state, "best": state})
    np.savez(tmp_path / "a.npz", **state)
    assert models.from_torch("cnn", tmp_path / "a.npz", **check).meta["difference"] < 1e-5
    for name, match in (
        ("no.npz", "no such file"),
        ("a.pt", r"torch\.load\(path, weights_only=True\)"),
        ("b.npz", "b.npz is damaged"),
        ("b.safetensors", "b.safetensors is damaged"),
    ):
        if name != "no.npz":
            (tmp_path / name).write_bytes(b"PK\3\4 nothing")
        with pytest.raises(ValueError, match=match):
            models.from_torch("cnn", tmp_path / name)
    with pytest.raises(ValueError, match="no weights among the keys: none"):
        models.from_torch("cnn", {})


def test_safetensors_lose_the_order_but_numbers_tell(tmp_path):
    state, images, logits = golden("vgg")  # features.11 sorts before features.4
    safetensors.numpy.save_file(state, tmp_path / "vgg.safetensors")
    loaded = models.from_torch("vgg", tmp_path / "vgg.safetensors", images=images, logits=logits)
    assert loaded.meta["layers"]["features.11"] == "conv4"


def test_wide_resnet_of_trades():
    """Each array of a state dict with TRADES' names stands, transposed, where it belongs."""
    module = models.make("wide_resnet", 10, depth=16, width=1)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    like = zoo.leaves_by_path(jax.eval_shape(module.init, jax.random.key(0), image))
    rng = np.random.default_rng(0)
    ours = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in like.items()}
    ours["params/head/bias"][:] = 0
    kinds = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    kinds |= {"mean": "running_mean", "var": "running_var"}
    state = {}
    for path, array in ours.items():
        _, *layer, kind = path.split("/")
        name = ".".join(layer).replace("shortcut_conv", "convShortcut").replace("head", "fc")
        if layer[0].startswith("stage"):
            stage, block = layer[0][5], int(layer[0][-1]) - 1
            name = name.replace(layer[0], f"block{stage}.layer.{block}")
        name = "bn1" if name == "bn" else name
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
        state[f"model.{name}.{kinds[kind]}"] = array.transpose(axes)
    del state["model.fc.bias"]  # of a head without one
    state["model.sub_block1.layer.0.conv1.weight"] = np.zeros((16, 16, 3, 3), np.float32)
    state["mu"], state["sigma"] = np.full((1, 3, 1, 1), 0.5), np.full((1, 3, 1, 1), 0.25)
    loaded = models.from_torch("wide_resnet", state)
    assert (loaded.module.depth, loaded.module.width) == (16, 1)
    assert loaded.module.mean == (0.5, 0.5, 0.5)
    got = zoo.flatten(loaded.variables)
    assert got.keys() == ours.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(got[path], array)


@pytest.mark.parametrize(
    ("depth", "blocks", "last"), [(34, (3, 4, 6, 3), "conv2"), (50, (3, 4, 6, 3), "conv3")]
)
def test_the_depth_of_a_resnet_is_read_from_its_blocks(depth, blocks, last):
    shapes = {"conv1": (64, 3, 7, 7)}
    for stage, count in enumerate(blocks, 1):
        shapes |= {f"layer{stage}.{i}.{c}": () for i in range(count) for c in ("conv1", last)}
    network = importlib.import_module("jaxdefense.models.resnet")
    assert network.torch_options(shapes) == {"depth": depth, "width": 64, "stem": "imagenet"}


# With torch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wide_resnet", "cnn"])
def test_the_golden_files_are_what_torch_gives(name):
    pytest.importorskip("torch")
    nets = importlib.import_module("torch_nets")
    net, images, logits = nets.made(name)
    models.from_torch(name, net.state_dict(), images=images, logits=logits, tolerance=2e-5)
    if name == "cnn":
        np.testing.assert_allclose(golden(name)[2], logits.numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def bridged():
    """(PyTorch network, apply, variables) with most of what image classifiers use."""
    torch = pytest.importorskip("torch")
    from jaxdefense.models import torch_bridge

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            nn = torch.nn
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
            self.group = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.GroupNorm(2, 8))
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm, self.drop, self.head = nn.LayerNorm(8), nn.Dropout(), nn.Linear(32, 5)

        def forward(self, x):
            F = torch.nn.functional
            x = F.max_pool2d(self.stem(x - 0.5), 3, 2, 1)
            x = torch.cat([x[:, :4] + 1, F.gelu(self.group(x))[:, 4:]], 1)
            y = self.norm(x.flatten(2).transpose(1, 2))
            y = (y + self.attend(y, y, y)[0]).transpose(1, 2).reshape(x.shape)
            return self.head(self.drop(F.silu(F.avg_pool2d(y, 2)).reshape(x.size(0), -1)))

    torch.manual_seed(0)
    net = Net().eval()
    return net, *torch_bridge.from_module(net, (16, 16, 3))


def test_a_bridged_module_has_pytorchs_logits_and_input_gradients(bridged):
    import torch

    net, apply, variables = bridged
    images = np.random.default_rng(0).uniform(size=(3, 16, 16, 3)).astype(np.float32)
    theirs = torch.tensor(np.moveaxis(images, -1, 1).copy(), requires_grad=True)
    logits = net(theirs)
    logits[:, 1].sum().backward()
    value, gradient = jax.jit(jax.value_and_grad(lambda x: apply(variables, x)[:, 1].sum()))(images)
    np.testing.assert_allclose(value, logits[:, 1].sum().item(), rtol=1e-5)
    wanted = np.moveaxis(theirs.grad.numpy(), 1, -1)
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max() + 1e-8)


def test_autoattack_judges_a_bridged_module(bridged):
    _, apply, variables = bridged
    images = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)
    ball = threat.Linf(0.5)
    verdict = evaluation.autoattack(
        apply, images, None, ball, variables=variables, attacks=["apgd-ce"]
    )
    assert verdict.clean.all()
    assert not verdict.robust.all()


LAYERS = {
    "softplus": lambda nn: nn.Softplus(),
    "mish": lambda nn: nn.Mish(),
    "celu": lambda nn: nn.CELU(),
    "instance norm": lambda nn: nn.InstanceNorm2d(3, affine=True),
    "norm pooling": lambda nn: nn.LPPool2d(2, 2),
    "nearest": lambda nn: nn.Upsample(scale_factor=1.7),
    "nearest to a size": lambda nn: nn.Upsample(size=(12, 5)),
    "bilinear": lambda nn: nn.Upsample(scale_factor=1.7, mode="bilinear"),
    "bilinear, aligned": lambda nn: nn.Upsample(size=(5, 12), mode="bilinear", align_corners=True),
    "transposed": lambda nn: nn.ConvTranspose2d(3, 4, (3, 2), (2, 3), 1, output_padding=1),
    "transposed, dilated": lambda nn: nn.ConvTranspose2d(3, 4, 3, 2, dilation=2),
    "max-pooling to the edge": lambda nn: nn.MaxPool2d(3, 2, ceil_mode=True),
    "max-pooling not beyond it": lambda nn: nn.MaxPool2d(2, 4, padding=1, ceil_mode=True),
    "averages of pixels alone": lambda nn: nn.AvgPool2d(3, 2, 1, True, count_include_pad=False),
    "averages to the edge": lambda nn: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_bridged_layer_has_pytorchs_values_and_gradients(layer):
    torch = pytest.importorskip("torch")
    from jaxdefense.models import torch_bridge

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), layer(torch.nn), torch.nn.Flatten()).eval()
    apply, variables = torch_bridge.from_module(net, (10, 9, 3), tolerance=1e-5)
    images = np.random.default_rng(1).uniform(size=(2, 10, 9, 3)).astype(np.float32)
    theirs = torch.tensor(np.moveaxis(images, -1, 1).copy(), requires_grad=True)
    y = net(theirs)
    weights = np.random.default_rng(2).normal(size=y.shape).astype(np.float32)
    (y * torch.tensor(weights)).sum().backward()
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(apply(variables, x) * weights)))(images)
    wanted = np.moveaxis(theirs.grad.numpy(), 1, -1)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max())


def test_wrong_dtypes_and_shapes_are_refused():
    torch = pytest.importorskip("torch")
    from jaxdefense.models import torch_bridge

    def net():
        return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten()).eval()

    for dtype in ("float64", "float16", "bfloat16"):
        with pytest.raises(ValueError, match=rf"in torch\.{dtype}: call module\.float\(\) first"):
            torch_bridge.from_module(net().to(getattr(torch, dtype)), (8, 8, 3))
    for shape in (8, (8, 8), (8, 8, 0), (8, 8, 3.0), "883"):
        with pytest.raises(ValueError, match=r"image_shape is \(H, W, C\), three numbers, got"):
            torch_bridge.from_module(net(), shape)
    with pytest.raises(ValueError, match=r"trace .*image_shape is \(H, W, C\): is it \(8, 9, 3\)"):
        torch_bridge.from_module(net(), (3, 8, 9))


def test_torch_prints_nothing_beside_the_one_line(capfd):
    torch = pytest.importorskip("torch")
    from jaxdefense.models import torch_bridge

    class Branch(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2))
    try:
        for net in (Branch(), linear):
            with pytest.raises(ValueError, match=r"torch\.export cannot trace the module: .+$"):
                torch_bridge.from_module(net.eval(), (4, 4, 1))
        assert (capfd.readouterr(), seen) == (("", ""), [])
        log.error("again")
        assert len(seen) == 1
    finally:
        log.removeHandler(handler)


def test_a_module_that_cannot_be_bridged_says_why():
    torch = pytest.importorskip("torch")
    from jaxdefense.models import torch_bridge

    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.erfinv(x).flatten(1)

    with pytest.raises(ValueError, match=r"no JAX form of aten\.erfinv\.default"):
        torch_bridge.from_module(Net().eval(), (4, 4, 1))
    with pytest.raises(ValueError, match=r"call module\.eval\(\)"):
        torch_bridge.from_module(torch.nn.Linear(2, 2), (4, 4, 1))
    with pytest.raises(ValueError, match=r"torch\.export cannot trace"):
        torch_bridge.from_module(torch.nn.Linear(2, 2).eval(), (4, 4, 1))
    with pytest.raises(ValueError, match=r"torch\.nn\.Module, got OrderedDict; models\.from_torch"):
        torch_bridge.from_module(torch.nn.Linear(2, 2).state_dict(), (4, 4, 1))

    class Pair(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1), x

    with pytest.raises(ValueError, match=r"must return logits \(B, K\), one tensor.* tuple"):
        torch_bridge.from_module(Pair().eval(), (4, 4, 1))
    broken = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
    torch.nn.init.constant_(broken[1].bias, math.nan)
    with pytest.raises(ValueError, match="logits of random images are not finite"):
        torch_bridge.from_module(broken, (4, 4, 1))
