"""Files are written whole or not at all."""

import errno
import os

import numpy as np
import pytest

from jaxdefense import files


def test_files_and_folders_above_them_are_written(tmp_path):
    files.write_text(tmp_path / "a" / "b.txt", "é\n")
    files.write_bytes(tmp_path / "b.bin", b"\0")
    files.write_arrays(tmp_path / "c.npz", x=np.arange(3))
    assert (tmp_path / "a" / "b.txt").read_text() == "é\n"
    assert (tmp_path / "b.bin").read_bytes() == b"\0"
    assert np.load(tmp_path / "c.npz")["x"].tolist() == [0, 1, 2]
    assert (tmp_path / "b.bin").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    def replace(*_):
        raise error

    files.write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(type(error)):
        files.write_text(tmp_path / "a.txt", "new")
    with pytest.raises(TypeError):
        files.write_bytes(tmp_path / "a.txt", None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
