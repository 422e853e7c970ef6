"""Files are written whole or not at all: under a temporary name, then renamed; and locks of places.

A failed write leaves the old file, nothing of the new one, and an OSError that names the path;
`explain` makes one line of it. What a killed process leaves, `remove_leftovers` removes.
"""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Why a place takes no file, and what the user can do about it.
_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may use",
    errno.EPERM: "choose a place that you may use",
}

TEMPORARY = ".tmp"


def explain(error: OSError) -> str:
    """One line of what could not be read or written, why, and what to do.

    Args:
      error: names a path, as those of this module do.

    >>> from jaxdefense import files
    >>> files.explain(OSError(28, "No space left on device", "runs/a/config.json"))
    'runs/a/config.json: No space left on device; free some space, then run the same command again'
    """
    line = error.strerror or str(error)
    if error.filename is not None:
        line = f"{os.fspath(error.filename)}: {line}"
    if advice := _ADVICE.get(error.errno or 0):
        line = f"{line}; {advice}, then run the same command again"
    return " ".join(line.split())


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the system inside the block name `path`.

    Args:
      path: what the user knows of; the system may name no file, or a temporary one.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def is_writable(folder: str | os.PathLike) -> bool:
    """Whether this process may write in a folder, or make it where it is not there.

    Args:
      folder: need not be there.

    >>> import tempfile
    >>> from jaxdefense import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.is_writable(f"{folder}/runs/new")
    True
    """
    path = pathlib.Path(folder).absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def check_name(what: str, name: object) -> None:
    """A name that becomes a file's stays in the folder that the file is written to.

    Args:
      what: is named, for the error: "attack", "the config's name".
      name: from a config, a record or a caller.

    Raises:
      ValueError: no text, an empty one, "." or "..", or one with a slash, backslash or NUL.

    >>> from jaxdefense import files
    >>> files.check_name("attack", "pgd40")
    >>> files.check_name("attack", "../pgd40")
    Traceback (most recent call last):
    ValueError: attack '../pgd40' cannot name a file: give one without slashes
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{what} {name!r} cannot name a file: give one without slashes")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file and the folders above it.

    Args:
      path: of the file; one that is there is replaced.
      text: all of it.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a binary file and the folders above it.

    Args:
      path: of the file; one that is there is replaced.
      data: all of it.
    """
    _write(pathlib.Path(path), lambda file: file.write(data))


def write_arrays(path: str | os.PathLike, **arrays: Any) -> None:
    """Writes a NumPy archive and the folders above it.

    Args:
      path: of the file, ending in .npz; one that is there is replaced.
      **arrays: by name.
    """
    _write(pathlib.Path(path), lambda file: np.savez(file, **arrays))


def _write(path: pathlib.Path, fill: Callable[[IO[bytes]], Any]) -> None:
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = temporary_prefix(path.name)
        with tempfile.NamedTemporaryFile(
            "wb", dir=path.parent, prefix=prefix, suffix=TEMPORARY, delete=False
        ) as file:
            part = pathlib.Path(file.name)
        try:
            with part.open("wb") as file:
                fill(file)
            part.chmod(0o644)
            os.replace(part, path)
        except BaseException:  # Ctrl-C too: no half of a file stays
            part.unlink(missing_ok=True)
            raise


def temporary_prefix(name: str) -> str:
    """How the name of a temporary file or folder of this process begins; it ends in `TEMPORARY`.

    Args:
      name: of what it becomes.
    """
    return f".{name[:100]}.{_host()}.{os.getpid()}."


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes the temporary files and folders that killed processes of this machine have left.

    Args:
      folder: where they wrote; one that is not there holds none.
    """
    for path in folder.glob(f".*.{_host()}.*.*{TEMPORARY}"):
        number = path.name.split(".")[-3]
        if number.isdigit() and not _is_running(int(number)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _host() -> str:
    return socket.gethostname()


def _is_running(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def locked(path: str | os.PathLike, user: str) -> Iterator[None]:
    """Keeps a place for this process while the block runs: two would write the same files.

    The system drops the lock of a process that has ended, however it ended. Where files cannot be
    locked (Windows, some network disks) the file itself is the lock: one of a process of this
    machine that has ended is taken over, one of another machine has to be removed by hand.

    Args:
      path: of the lock's file, which tells who has the place; it is removed at the end, and so are
        the folders that were made for it, if they are still empty.
      user: what this process does there, for the message that another one gets.

    Raises:
      ValueError: another process has the place; says which one, and since when. Or a folder is
        where the file belongs.

    >>> import tempfile
    >>> from jaxdefense import files
    >>> with tempfile.TemporaryDirectory() as folder, files.locked(f"{folder}/lock", "training"):
    ...     try:
    ...         with files.locked(f"{folder}/lock", "training"):
    ...             print("never here")
    ...     except ValueError as error:
    ...         print("is in use by another training: process" in str(error))
    True
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where a lock has a file: remove it")
    made = [folder for folder in path.parents if not folder.exists()]
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    holder = {"user": user, "host": _host(), "pid": os.getpid()}
    holder["since"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    descriptor = None
    try:
        with naming(path):
            descriptor = _lock(path, json.dumps(holder))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        if descriptor is not None:
            os.close(descriptor)
        for folder in made:
            with contextlib.suppress(OSError):  # it is in use by now
                folder.rmdir()


def _lock(path: pathlib.Path, holder: str) -> int | None:
    """Takes a lock; a descriptor that holds it until it is closed, or None where the file does."""
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine, there = os.fstat(descriptor), path.stat()
            if (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, holder.encode())
                return descriptor
        except FileNotFoundError:  # the one that had it removed it meanwhile
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(_refusal(path, _read_holder(path))) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _ADVICE:  # no room even for this
                path.unlink(missing_ok=True)
                raise
            break  # this disk cannot lock
        except BaseException:
            os.close(descriptor)
            raise
        else:
            os.close(descriptor)
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            before = _read_holder(path)
            if before.get("host") != _host() or _is_running(int(before.get("pid", 0))):
                raise ValueError(_refusal(path, before)) from None
            path.unlink(missing_ok=True)
            continue
        try:
            os.write(descriptor, holder.encode())
        finally:
            os.close(descriptor)
        return None


def _read_holder(path: pathlib.Path) -> dict[str, Any]:
    """What a lock's file tells; nothing where it tells nothing."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(path: pathlib.Path, holder: dict[str, Any]) -> str:
    """Who has a place, and what to do."""
    who = "another process"
    if holder:
        who = (
            f"another {holder.get('user')}: process {holder.get('pid')} on {holder.get('host')} "
            f"since {holder.get('since')}"
        )
    line = f"{path.parent} is in use by {who}; wait for its end, or choose another place"
    if holder.get("host") != _host():
        line += f"; if no such process runs any more, remove {path}"
    return line
