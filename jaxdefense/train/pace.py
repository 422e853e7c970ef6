"""How many steps are sent to the devices at once."""

# What a piece of several steps takes at most. Between two pieces a run can be interrupted: SLURM
# kills 30 seconds after SIGTERM.
SECONDS = 3.0

_UNMEASURED = 2  # calls of one step: the first one compiles, the second one is measured


class Pace:
    """Keeps the pieces of a dispatch within some seconds, by what the steps before have taken.

    One program has one pace. Where pieces end changes no bit of the state, nor of the log.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._per_step = 0.0

    def steps(self, most: int) -> int:
        """How many steps the next piece has.

        Args:
          most: steps until the dispatch ends.
        """
        if self._calls < _UNMEASURED:
            return min(1, most)
        fitting = SECONDS / max(self._per_step, 1e-9)
        return most if fitting >= most else max(1, int(fitting))

    def measured(self, steps: int, seconds: float) -> None:
        """Learns from a piece.

        Args:
          steps: that it had.
          seconds: that it took.
        """
        self._calls += 1
        if self._calls > 1:
            self._per_step = seconds / steps
