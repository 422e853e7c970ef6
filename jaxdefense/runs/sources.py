"""The trained runs that a config names (a teacher): where they are, and their copies in a workdir.

Wherever an option of the defence is {"workdir": ..., "checkpoint": "best"}, the classifier of that
run is meant; {"file": ...} means one that `models.save` or `runs.export` wrote. Training copies it
into its own workdir, so that a workdir is all that its run needs.
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from jaxdefense import distributed, files, registry
from jaxdefense.runs import config_file

_COPIES = "given"  # the folder of the copies in a workdir


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained run that a config names.

    Attributes:
      path: the workdir of the run, or a file.
      checkpoint: 'best' or 'last', of a workdir.
      original: what `path` is a copy of, where it is the copy in a run's workdir.
    """

    path: pathlib.Path
    checkpoint: str = "best"
    original: pathlib.Path | None = None

    def __str__(self) -> str:
        return str(self.path if self.path.is_file() else self.path / self.checkpoint)


def find_sources(
    options: Mapping[str, Any], *path: str
) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """All options of a defence, at any depth, that name a workdir or a file.

    Args:
      options: of the defence.
      *path: of these options inside the section, for the recursion.

    Returns:
      {path of an option: its value}.
    """
    found = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and ("workdir" in value or "file" in value):
            found[*path, name] = value
        elif isinstance(value, Mapping):
            found |= find_sources(value, *path, name)
    return found


def replace_option(options: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The options with the one at `path` replaced.

    Args:
      options: of the defence.
      path: of `find_sources`.
      value: the new one.
    """
    name, *rest = path
    return {**options, name: replace_option(options[name], tuple(rest), value) if rest else value}


def locate_source(option: str, spec: Mapping[str, Any], workdir: pathlib.Path | None) -> Source:
    """Where a named run is: its copy in this run's workdir, if there is one.

    Args:
      option: its path in the section "defense", with dots.
      spec: {"workdir": ..., "checkpoint": "best" or "last"}, or {"file": ...}.
      workdir: of the run whose config names it.

    Raises:
      ValueError: an unknown key or kind of checkpoint, or an option that cannot name its copy.
    """
    files.check_name("option of defense", option)
    if "file" in spec:
        registry.check_known(f"key of defense.{option}", spec, ("file",))
        original = pathlib.Path(spec["file"])
        copy = None if workdir is None else workdir / _COPIES / f"{option}.safetensors"
        is_copied = copy is not None and distributed.from_writer(copy.is_file)
        return Source(copy, original=original) if copy and is_copied else Source(original)
    registry.check_known(f"key of defense.{option}", spec, ("workdir", "checkpoint"))
    kind = spec.get("checkpoint", "best")
    if kind not in ("best", "last"):
        registry.raise_unknown(f"defense.{option}.checkpoint", kind, ("best", "last"))
    original = pathlib.Path(spec["workdir"])
    copy = None if workdir is None else workdir / _COPIES / option
    is_copied = copy is not None and distributed.from_writer(copy.is_dir)
    return Source(copy, kind, original) if copy and is_copied else Source(original, kind)


def copy_sources(sources: Mapping[str, Source], workdir: pathlib.Path) -> None:
    """Copies trained runs into a workdir, each whole or not at all.

    Args:
      sources: by option.
      workdir: of the run whose config names them.
    """
    for option, source in sources.items():
        target = workdir / _COPIES / option
        if source.path.is_file():
            target = target.with_name(f"{option}.safetensors")
            if not target.exists():
                files.write_bytes(target, source.path.read_bytes())
            continue
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = files.temporary_prefix(_COPIES)
        with tempfile.TemporaryDirectory(files.TEMPORARY, prefix, workdir) as folder:
            copy = pathlib.Path(folder) / option
            copy.mkdir()
            for name in (config_file.NAME, config_file.LISTING):
                if (source.path / name).exists():
                    shutil.copy(source.path / name, copy)
            for part in (source.checkpoint, _COPIES):
                if (source.path / part).is_dir():
                    shutil.copytree(source.path / part, copy / part)
            os.replace(copy, target)
