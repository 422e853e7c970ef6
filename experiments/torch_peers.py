"""The same networks in torch with the same weights, to compare with peers; development only.

The library never imports torch. `pip install torch torchattacks --no-deps` and torchattacks' own
requirements (requests, tqdm, scipy) are enough.

As a program it runs torchattacks' PGD once for each line that it reads, and answers each with a
line: a process of its own, because torch and XLA in one process get in each other's way.
"""

import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class CNN(nn.Module):
    """jaxdefense.models.cnn at width 1."""

    def __init__(self, num_classes=10, side=28, channels=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 4, stride=2, padding=1)
        self.fc1 = nn.Linear(32 * (side // 4) ** 2, 100)
        self.head = nn.Linear(100, num_classes)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = x.permute(0, 2, 3, 1).flatten(1)  # the order in which Flax flattens
        return self.head(F.relu(self.fc1(x)))


class Block(nn.Module):
    """The basic residual block of jaxdefense.models.resnet."""

    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        if stride > 1 or inputs != channels:
            self.shortcut_conv = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "shortcut_conv"):
            x = self.shortcut_bn(self.shortcut_conv(x))
        return F.relu(x + y)


class ResNet18(nn.Module):
    """jaxdefense.models.resnet at depth 18."""

    def __init__(self, num_classes=10, width=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs, self.names = width, []
        for stage in range(4):
            for i in range(2):
                channels = width * 2**stage
                name = f"stage{stage + 1}_block{i + 1}"
                block = Block(inputs, channels, 2 if stage and not i else 1)
                self.add_module(name, block)
                self.names.append(name)
                inputs = channels
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


def load(module, variables):
    """Puts Flax variables {"params", "batch_stats"} into the torch module of the same names."""
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = {}
    for collection in ("params", "batch_stats"):
        _flatten(variables.get(collection, {}), (), names, state)
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    return module.eval()


def _flatten(tree, path, names, state):
    for key, value in tree.items():
        if hasattr(value, "items"):
            _flatten(value, (*path, key), names, state)
            continue
        array = np.array(value)
        if key == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        state[".".join((*path, names.get(key, key)))] = torch.from_numpy(array.copy())


def serve(problem):
    """PGD on the problem that experiments/benchmark.py wrote, once per line of standard input."""
    import torchattacks

    with np.load(problem) as file:
        arrays = dict(file)
    tree = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = array
    module = load({"cnn": CNN, "resnet": ResNet18}[str(tree["name"])](), tree["variables"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device, memory_format=torch.channels_last)
    eps, step_size, steps = float(tree["eps"]), float(tree["step_size"]), int(tree["steps"])
    attack = torchattacks.PGD(module, eps=eps, alpha=step_size, steps=steps)
    x = torch.from_numpy(tree["images"].transpose(0, 3, 1, 2).copy()).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(tree["labels"]).to(device)
    for _ in sys.stdin:
        attack(x, y)
        if device == "cuda":
            torch.cuda.synchronize()
        print("done", flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
