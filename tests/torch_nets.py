"""PyTorch's networks in the layouts of the field, small: for the tests of `models.from_torch`.

    python tests/torch_nets.py     # writes tests/golden/torch/NAME.npz anew

Each golden file holds a state dict, images and the logits that PyTorch 2.13 has for them. Weights
are drawn from seed 0 and rounded to float16, in which they are stored, one after the other.
"""

import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

GOLDEN = pathlib.Path(__file__).parent / "golden" / "torch"


def norm(x, channels):
    return nn.Sequential(x, nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """A block of ResNet-18, its shortcut called as pytorch-cifar or as torchvision does."""

    def __init__(self, c_in, c, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.side = None
        if stride != 1 or c_in != c:
            self.side = shortcut
            setattr(self, shortcut, norm(nn.Conv2d(c_in, c, 1, stride, bias=False), c))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.side is None else getattr(self, self.side)(x)))


class PreActBlock(nn.Module):
    """A block of pytorch-cifar's PreActResNet-18."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        if stride != 1 or c_in != c:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=False))

    def forward(self, x):
        y = F.relu(self.bn1(x))
        side = self.shortcut(y) if hasattr(self, "shortcut") else x
        return side + self.conv2(F.relu(self.bn2(self.conv1(y))))


class ResNet(nn.Module):
    """The frame of the above: conv1, layer1 to layer4, and a head of either name."""

    def __init__(self, block, width, head, *, stem=3, bn=True, final_bn=False):
        super().__init__()
        self.head, self.stem = head, stem
        self.conv1 = nn.Conv2d(3, width, stem, 2 if stem == 7 else 1, stem // 2, bias=False)
        if bn:
            self.bn1 = nn.BatchNorm2d(width)
        c_in = width
        for stage in range(4):
            c = width * 2**stage
            blocks = [block(c_in, c, 2 if stage else 1), block(c, c, 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            c_in = c
        if final_bn:
            self.bn = nn.BatchNorm2d(c_in)
        setattr(self, head, nn.Linear(c_in, 10))

    def forward(self, x):
        x = self.conv1(x)
        if hasattr(self, "bn1"):
            x = F.relu(self.bn1(x))
        if self.stem == 7:
            x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
        if hasattr(self, "bn"):
            x = F.relu(self.bn(x))
        return getattr(self, self.head)(x.mean((2, 3)))


class WideBlock(nn.Module):
    """A block of TRADES' WideResNet."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.convShortcut = None if c_in == c else nn.Conv2d(c_in, c, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        side = x if self.convShortcut is None else self.convShortcut(y)
        return side + self.conv2(F.relu(self.bn2(self.conv1(y))))


class Stage(nn.Module):
    """What TRADES calls a NetworkBlock."""

    def __init__(self, *blocks):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-10-1 with TRADES' names, its unused sub_block1 and no bias in the head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(WideBlock(16, 16, 1))
        self.sub_block1 = Stage(WideBlock(16, 16, 1))
        self.block2 = Stage(WideBlock(16, 32, 2))
        self.block3 = Stage(WideBlock(32, 64, 2))
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10, bias=False)

    def forward(self, x):
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(F.avg_pool2d(x, 8).flatten(1))


class Inverted(nn.Module):
    """A block of pytorch-cifar's MobileNetV2."""

    def __init__(self, c_in, c, inner, stride):
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(c_in, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, c, 1, bias=False), nn.BatchNorm2d(c)
        self.shortcut = nn.Sequential()
        if stride == 1 and c_in != c:
            self.shortcut = norm(nn.Conv2d(c_in, c, 1, bias=False), c)

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self.stride == 1 else y


class MobileNet(nn.Module):
    """pytorch-cifar's MobileNetV2, a sixteenth as wide."""

    def __init__(self):
        super().__init__()
        plans = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2))
        plans += ((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        self.conv1, self.bn1 = nn.Conv2d(3, 2, 3, 1, 1, bias=False), nn.BatchNorm2d(2)
        blocks, c_in = [], 2
        for expansion, channels, count, stride in plans:
            c = max(1, round(channels / 16))
            for i in range(count):
                blocks.append(Inverted(c_in, c, expansion * c_in, stride if i == 0 else 1))
                c_in = c
        self.layers = nn.Sequential(*blocks)
        self.conv2, self.bn2 = nn.Conv2d(c_in, 80, 1, bias=False), nn.BatchNorm2d(80)
        self.linear = nn.Linear(80, 10)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class VGG(nn.Module):
    """pytorch-cifar's VGG-11: a bias before each BatchNorm."""

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for c in (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"):
            if c == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()]
                c_in = c
        self.features = nn.Sequential(*layers, nn.AvgPool2d(1))
        self.classifier = nn.Linear(c_in, 10)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Normalised(nn.Module):
    """RobustBench's way: a network behind its normalisation, which are buffers."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("mu", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("sigma", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x):
        return self.model((x - self.mu) / self.sigma)


def cnn():
    """The MNIST network of the robustness literature, a quarter as wide, for 8x8 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 25), nn.ReLU(), nn.Linear(25, 10)),
    )


def lenet(padding):
    """LeNet on 28x28 pixels, a third as wide."""
    pixels = 25 if padding else 16
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2, 5, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(5 * pixels, 40), nn.ReLU(), nn.Linear(40, 28), nn.ReLU(), nn.Linear(28, 10)),
    )


def mnist_net():
    """Madry et al.'s MNIST network with BatchNorm and biases before it, for 8x8 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 5, padding=2), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2, 4, 5, padding=2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)),
    )


CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


def cifar_resnet():
    """pytorch-cifar's ResNet-18 behind RobustBench's normalisation, for several devices."""
    net = ResNet(lambda *args: BasicBlock(*args, "shortcut"), 1, "linear")
    return nn.DataParallel(Normalised(net, *CIFAR))


# name: (registered name, network, shape of an image, further arguments of from_torch)
NETS = {
    "cnn": ("cnn", cnn, (1, 8, 8), {}),
    "lenet": ("lenet", lambda: lenet(2), (1, 28, 28), {}),
    "lenet_unpadded": ("lenet", lambda: lenet(0), (1, 28, 28), {}),
    "mnist_net": ("mnist_net", mnist_net, (1, 8, 8), {}),
    "resnet": ("resnet", cifar_resnet, (3, 32, 32), {}),
    "resnet_imagenet": (
        "resnet",
        lambda: ResNet(lambda *args: BasicBlock(*args, "downsample"), 1, "fc", stem=7),
        (3, 64, 64),
        {},
    ),
    "preact_resnet": (
        "preact_resnet",
        lambda: ResNet(PreActBlock, 1, "linear", bn=False, final_bn=True),
        (3, 32, 32),
        {},
    ),
    "wide_resnet": ("wide_resnet", WideResNet, (3, 32, 32), {}),
    "vgg": ("vgg", VGG, (3, 32, 32), {}),
    "mobilenet": ("mobilenet", MobileNet, (3, 32, 32), {}),
}


def made(name):
    """A network in eval mode with random statistics, its images (B, C, H, W) and their logits."""
    _, make, shape, _ = NETS[name]
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # so that the images differ in the logits
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.5, 0.2)  # so that few units are dead in nets this narrow
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())
        images = torch.rand(2, *shape).mul(255).round() / 255
        return net, images, net(images)


def main():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in NETS:
        if name == "wide_resnet":  # 77,000 weights at its narrowest
            continue
        net, images, logits = made(name)
        state = {k: v for k, v in net.state_dict().items() if not k.endswith("_tracked")}
        np.savez_compressed(
            GOLDEN / f"{name}.npz",
            pixels=(images * 255).round().to(torch.uint8).numpy(),
            logits=logits.numpy(),
            names=json.dumps({key: list(tensor.shape) for key, tensor in state.items()}),
            state=np.concatenate([tensor.half().numpy().ravel() for tensor in state.values()]),
        )


if __name__ == "__main__":
    main()
