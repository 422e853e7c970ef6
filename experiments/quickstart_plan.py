"""What quickstart runs: which systems beside which, in what order, and how long that takes.

Nothing here imports JAX, so that the script answers in a second.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

import configs

from jaxdefense import registry

BASELINES = ("standard", "pgd_at", "trades")

# The systems, each with its main rival: the quickest of those that its paper compares with.
RIVALS = {
    "m2at": "avmixup",
    "claf": "supcon",
    "csa": "fgsm_at",
    "cse": "zhang_evans",
    "gssl": "gssl_baseline",
    "ipg": "hgd",
    "add": "ard",
}

RECORDS = pathlib.Path(__file__).parent / "records" / "quickstart"


def select(systems: str) -> list[str]:
    """The configs' names that --systems asks for.

    Args:
      systems: names with commas between them, where "all" is every one; or "" for the seven
        systems, their main rivals and the baselines.

    Raises:
      ValueError: an unknown name; the nearest are named. Or no name, only commas and blanks.
    """
    if not systems:
        return [*BASELINES, *RIVALS, *RIVALS.values()]
    names = [name.strip() for name in systems.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"--systems={systems!r} names no system; names: {', '.join(configs.names())}"
        )
    registry.check_known("system", names, [*configs.names(), "all"])
    if "all" in names:
        return configs.names()
    return list(dict.fromkeys(names))


def committed_seconds(folder: pathlib.Path = RECORDS) -> dict[str, float]:
    """What each system took when its committed record was made: training and evaluation.

    Args:
      folder: of the records; where it is missing nothing is known.
    """
    known = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        known[path.stem] = record["seconds"] + record["training"]["seconds"]
    return known


class Clock:
    """Foretells seconds: those of the committed records, scaled by what this machine takes.

    Args:
      known: {system: seconds} on another machine.
    """

    def __init__(self, known: Mapping[str, float]):
        self._known = dict(known)
        self._measured: dict[str, float] = {}

    def measured(self, name: str, seconds: float) -> None:
        """Notes what a system took here.

        Args:
          name: of the system.
          seconds: wall time.
        """
        self._measured[name] = seconds

    def expected(self, name: str) -> float | None:
        """The seconds that a system will take here; None where nothing tells.

        Args:
          name: of the system.
        """
        both = [name for name in self._measured if name in self._known]
        scale = 1.0
        if both:
            scale = sum(self._measured[n] for n in both) / sum(self._known[n] for n in both)
        known = {n: scale * seconds for n, seconds in self._known.items()} | self._measured
        if not known:
            return None
        return known.get(name, sum(known.values()) / len(known))

    def left(self, running: Mapping[str, float], waiting: Sequence[str], workers: int) -> float:
        """Seconds until everything is done; NaN where nothing tells.

        Args:
          running: {system: seconds since it began}.
          waiting: systems in the order in which they will begin.
          workers: processes that share them.
        """
        if self.expected("") is None and (running or waiting):
            return float("nan")
        # A system that takes longer than foretold is taken for nearly done.
        ends = [max(self.expected(name) - since, 1.0) for name, since in running.items()]
        ends += [0.0] * (workers - len(ends))
        for name in waiting:
            ends.sort()
            ends[0] += self.expected(name)
        return max(ends, default=0.0)


def order(names: Sequence[str], clock: Clock) -> list[str]:
    """The order in which systems begin.

    The quickest baseline is first, for an early row; it also compiles the attacks that most others
    then take from the cache. Beside it begins the longest of all, and after it the other baselines,
    which the rest is read against. The rest begins with the longest, so that all processes are busy
    to the end.

    Args:
      names: of the systems.
      clock: that foretells their seconds.
    """
    quickest = sorted(names, key=lambda name: clock.expected(name) or 0.0)
    early = [name for name in quickest if name in BASELINES] or quickest[:1]
    others = [name for name in reversed(quickest) if name not in early]
    return early[:1] + others[:1] + early[1:] + others[1:]
