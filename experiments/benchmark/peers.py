"""Runs torch_peers.py in a process of its own, on a network's weights and a batch of images.

torch beside XLA in one process crawls. A problem goes there as an .npz file.
"""

import contextlib
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

_SCRIPT = pathlib.Path(__file__).parent / "torch_peers.py"


def flatten(variables):
    """{"variables/params/conv1/kernel": array, ...}."""
    return {
        "/".join(("variables", *(str(key.key) for key in path))): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }


def classifier(trained):
    """{"params", "batch_stats"} of the plain network in a trained run's {"params", "carry"}."""
    found = {"params": trained["params"]["classifier"]}
    if trained["carry"]["classifier"]:
        found["batch_stats"] = trained["carry"]["classifier"]
    return found


@contextlib.contextmanager
def pgd_in_torch(variables, **problem):
    """A function that runs torchattacks' PGD once per call; the process ends with the context.

    Args:
      variables: {"params", "batch_stats"}.
      **problem: "name" of the model, "images", "labels", "eps", "steps" and "step_size".
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "problem.npz"
        np.savez(path, **problem, **flatten(variables))
        with subprocess.Popen(
            [sys.executable, str(_SCRIPT), "serve", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:

            def run():
                child.stdin.write("go\n")
                child.stdin.flush()
                if child.stdout.readline() != "done\n":
                    raise ValueError("the torch process failed; its error is above")

            yield run
            child.stdin.close()


def answer_of_torch(command, run, ball, variables, images, labels, *arguments, **more):
    """What a command of torch_peers writes about a network.

    Args:
      command: "cascade" or "targeted".
      run: of the network, a cnn or a resnet.
      ball: the threat.
      variables: {"params", "batch_stats"}.
      images: (N, H, W, C) in [0, 1], NumPy.
      labels: (N,), NumPy.
      *arguments: the command's further words.
      **more: further arrays of the problem.
    """
    model = run.config["model"]
    given = {"name": model["name"], "width": model.get("width", 1.0), "norm": ball.norm, **more}
    with tempfile.TemporaryDirectory() as folder:
        problem, answer = (pathlib.Path(folder) / name for name in ("in.npz", "out.npz"))
        given |= {"eps": ball.eps, "images": images, "labels": labels, **flatten(variables)}
        np.savez(problem, **given)
        # torch 2.13 corrupts its heap in FAB on a residual network when it has two threads, in the
        # layout that is its faster one: `taskset -c 0` gives both sides one core.
        words = [sys.executable, str(_SCRIPT), command, str(problem), str(answer), *arguments]
        subprocess.run(words, check=True)
        with np.load(answer) as file:
            return dict(file)
