"""Runs a script as a process of the study: python study_step.py SCRIPT ARGUMENTS.

Where stdin ends, because the study was killed, the script is asked to end as by SIGTERM: training
saves first, and nothing goes on unseen.
"""

import os
import runpy
import signal
import sys
import threading


def watch_parent() -> None:
    """Ends this process once stdin does."""

    def read():
        # Unbuffered: a thread that waits inside a buffered file stops the interpreter from ending.
        with open(0, "rb", buffering=0, closefd=False) as pipe:
            while pipe.read(1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()


if __name__ == "__main__":
    watch_parent()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
