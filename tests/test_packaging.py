"""The wheel and the sdist are complete: the wheel imports, the sdist's tests run."""

import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
IN_GIT_ONLY = {
    ".gitignore",
    "MANIFEST.in",
}  # of no use to who has the sdist; MANIFEST.in may be there


def run(*command, cwd, **env):
    found = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def files():
    """What the repository holds, relative to its root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(files, tmp_path_factory):
    """The folder of a wheel and an sdist, built of a copy: building writes beside the sources."""
    copy, out = (tmp_path_factory.mktemp(name) for name in ("copy", "out"))
    for name in files:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    program = "import sys, setuptools.build_meta as build; out = sys.argv[1];"
    program += "build.build_sdist(out); build.build_wheel(out)"
    run(sys.executable, "-W", "ignore", "-c", program, str(out), cwd=copy)
    return out


def test_the_sdist_holds_the_repository(built, files):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert files - held <= IN_GIT_ONLY, sorted(files - held)
    made = {name for name in held - files if ".egg-info/" not in name}
    assert made <= {"PKG-INFO"}, sorted(made)


def test_the_wheel_holds_the_library_the_scripts_and_nothing_else(built, files):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    scripts = {name for name in files if re.fullmatch(r"experiments/.*\.py", name)}
    shared = {name for name in held if ".data/data/" in name}
    assert {name.partition(".data/data/share/jaxdefense/")[2] for name in shared} == scripts
    assert held - shared == {name for name in files if name.startswith("jaxdefense/")}
    extras = {"cuda", "digits", "docs", "plots", "test", "torch", "tpu", "train"}
    lines = metadata.splitlines()
    assert {line.split()[-1] for line in lines if line.startswith("Provides-Extra")} == extras
    plain = {line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line}
    names = {line.split(":")[1].strip().partition(">")[0].partition("<")[0] for line in plain}
    assert names == {"absl-py", "chex", "jax", "numpy", "optax", "tqdm"}


@pytest.mark.slow
def test_the_sdist_s_tests_run(built, tmp_path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    command = (sys.executable, "-m", "pytest", "-q", "tests/test_tables.py")
    told = run(*command, cwd=folder, PYTHONPATH=str(folder))
    assert "passed" in told or "100%" in told
