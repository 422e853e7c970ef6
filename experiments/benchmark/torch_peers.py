"""The same networks in torch with the same weights, to compare with peers; development only.

The library never imports torch. `pip install torch torchattacks --no-deps` and torchattacks' own
requirements (requests, tqdm, scipy) are enough.

A program of its own (peers.py starts it), because torch and XLA in one process get in each other's
way: `serve` runs torchattacks' PGD once for each line that it reads (pgd.py), `cascade` a whole
AutoAttack (attacks.py), `targeted` torchattacks' targeted PGD and CW (verdicts.py).
"""

import sys
import time
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class CNN(nn.Module):
    """jaxdefense.models.cnn."""

    def __init__(self, num_classes=10, side=28, channels=1, width=1.0):
        super().__init__()
        first, second, inner = (round(size * width) for size in (16, 32, 100))
        self.conv1 = nn.Conv2d(channels, first, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(first, second, 4, stride=2, padding=1)
        self.fc1 = nn.Linear(second * (side // 4) ** 2, inner)
        self.head = nn.Linear(inner, num_classes)

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


class Counted(nn.Module):
    """A network that counts the images it sees forward and backward."""

    def __init__(self, module):
        super().__init__()
        self.module, self.forward_passes, self.backward_passes = module, 0, 0

    def forward(self, x):
        self.forward_passes += len(x)
        logits = self.module(x.contiguous(memory_format=torch.channels_last))
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, grad):
        self.backward_passes += len(grad)


class Lifted(nn.Module):
    """A network whose logits are all larger by 100: the same classes, margins and gradients."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x) + 100


def read(problem):
    """(arrays, network, images, labels) of a problem file, on the best device there is."""
    with np.load(problem) as file:
        arrays = dict(file)
    tree = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = array
    side, channels = tree["images"].shape[2:]
    make = {
        "cnn": lambda: CNN(side=side, channels=channels, width=float(tree.get("width", 1))),
        "resnet": lambda: ResNet18(width=int(tree.get("width", 64))),
    }
    module = load(make[str(tree["name"])](), tree["variables"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device, memory_format=torch.channels_last)
    # Not channels_last: torchattacks' FAB cannot take such gradients.
    x = torch.from_numpy(tree["images"].transpose(0, 3, 1, 2).copy()).to(device)
    y = torch.from_numpy(tree["labels"].astype(np.int64)).to(device)
    return arrays, module, x, y


def serve(problem):
    """PGD on the problem that pgd.py wrote, once per line of standard input."""
    import torchattacks

    arrays, module, x, y = read(problem)
    eps, step_size, steps = (arrays[name].item() for name in ("eps", "step_size", "steps"))
    attack = torchattacks.PGD(module, eps=eps, alpha=step_size, steps=steps)
    for _ in sys.stdin:
        attack(x, y)
        if x.is_cuda:
            torch.cuda.synchronize()
        print("done", flush=True)


def reference_stages(module, norm, eps, folder):
    """{stage: (images, labels) -> images} of the authors' code, as standard AutoAttack sets it."""
    sys.path.insert(0, folder)
    from autoattack import AutoAttack

    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    device = next(module.parameters()).device
    peer = AutoAttack(module, norm=name, eps=eps, version="standard", device=device, verbose=False)
    peer.apgd.loss, peer.fab.targeted = "ce", True
    for part in (peer.apgd, peer.apgd_targeted, peer.fab, peer.square):
        part.seed = 0
    return {
        "apgd-ce": peer.apgd.perturb,
        "apgd-t": peer.apgd_targeted.perturb,
        "fab-t": peer.fab.perturb,
        "square": peer.square.perturb,
    }


def torchattacks_stages(module, norm, eps):
    """As `reference_stages`, by torchattacks with the standard's budgets; no L1."""
    import torchattacks as ta

    kw = dict(norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0)
    return {
        "apgd-ce": ta.APGD(module, steps=100, loss="ce", n_restarts=1, **kw),
        "apgd-t": ta.APGDT(module, steps=100, n_classes=10, n_restarts=1, **kw),
        "fab-t": ta.FAB(module, steps=100, multi_targeted=True, n_classes=10, n_restarts=1, **kw),
        "square": ta.Square(module, n_queries=5000, n_restarts=1, resc_schedule=False, **kw),
    }


def cascade(problem, answer, peer, reference):
    """A peer's standard AutoAttack, each stage on the survivors of those before, 500 at a time.

    Writes {"clean", stage: robust bits after it, "stage passes": (forward, backward), "seconds"}.
    """
    warnings.simplefilter("ignore")  # torch's own deprecations are not ours to mend
    arrays, module, x, y = read(problem)
    module = Counted(module).eval()
    norm, eps = str(arrays["norm"]), arrays["eps"].item()
    if peer == "reference":
        stages = reference_stages(module, norm, eps, reference)
    else:
        stages = torchattacks_stages(module, norm, eps)
    began = time.monotonic()
    with torch.no_grad():
        robust = torch.cat([module(part).argmax(1) for part in x.split(500)]) == y
    found = {"clean": robust.cpu().numpy()}
    for name, attack in stages.items():
        before = module.forward_passes, module.backward_passes
        for rows in torch.nonzero(robust)[:, 0].split(500):
            x_adv = attack(x[rows].clone(), y[rows].clone())
            with torch.no_grad():
                robust[rows] = module(x_adv).argmax(1) == y[rows]
        found[name] = robust.cpu().numpy().copy()
        after = module.forward_passes, module.backward_passes
        found[f"{name} passes"] = np.subtract(after, before)
        print(
            f"  {peer} {name}: {int(robust.sum())} left, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    np.savez(answer, seconds=time.monotonic() - began, **found)


def targeted(problem, answer, *names):
    """torchattacks' targeted PGD and CW, those of `names`, 500 images at a time.

    Its CW runs as it is and as "cw, mended": it multiplies logits with one-hot labels before taking
    their maximum, which is wrong where they are negative, so there they are lifted; and it starts
    at atanh(2 x - 1), where a pixel at the box's edge never moves, so there images start a hair
    inside, as here.

    Writes {attack: whether the target was hit, "attack distance": L2 lengths, "attack seconds"}.
    """
    import torchattacks

    warnings.simplefilter("ignore")
    arrays, module, x, _ = read(problem)
    targets = torch.from_numpy(arrays["targets"].astype(np.int64)).to(x.device)
    module = Counted(module).eval()
    pgd = {name: arrays[name].item() for name in ("eps", "alpha", "pgd_steps")}
    cw = {name: arrays[name].item() for name in ("c", "lr", "cw_steps")}
    pgd["steps"], cw["steps"] = pgd.pop("pgd_steps"), cw.pop("cw_steps")
    attacks = {
        "pgd": (torchattacks.PGD(module, random_start=False, **pgd), x),
        "cw": (torchattacks.CW(module, **cw), x),
        "cw, mended": (torchattacks.CW(Lifted(module).eval(), **cw), x.clamp(5e-7, 1 - 5e-7)),
    }
    found = {}
    for name in names:
        attack, start = attacks[name]
        attack.set_mode_targeted_by_label(quiet=True)
        began = time.monotonic()
        parts = zip(start.split(500), targets.split(500), strict=True)
        x_adv = torch.cat([attack(*part) for part in parts])
        found[f"{name} seconds"] = time.monotonic() - began
        with torch.no_grad():
            found[name] = (module(x_adv).argmax(1) == targets).cpu().numpy()
        found[f"{name} distance"] = (x_adv - x).flatten(1).norm(dim=1).cpu().numpy()
        print(f"  torchattacks {name}: {int(found[name].sum())} targets hit", flush=True)
    np.savez(answer, **found)


if __name__ == "__main__":
    {"serve": serve, "cascade": cascade, "targeted": targeted}[sys.argv[1]](*sys.argv[2:])
