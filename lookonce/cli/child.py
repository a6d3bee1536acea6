"""`python -m lookonce.cli.child PARENT SIGNAL MODULE [ARGUMENT...]`: runs MODULE, bound to its parent's life.

When the parent (process id PARENT) ends, however it ends, this process gets SIGNAL: at once by the kernel on Linux,
within a second by a watching thread elsewhere. So a killed supervisor leaves nothing behind that holds memory or ports.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 1.0


def command(
    module: str, arguments: list[str], *, signal_number: int = signal.SIGKILL, python: str = sys.executable
) -> list[str]:
    """The command line that runs a module as a child of the calling process; `python`: in another environment."""
    # -P: a file gateway.py in the user's working directory must not stand in for our package.
    prefix = [python, "-P", "-m", "lookonce.cli.child", str(os.getpid()), str(int(signal_number))]
    return [*prefix, module, *arguments]


def bind_to_parent(parent: int, signal_number: int) -> None:
    """Ask for `signal_number` when the process `parent` ends. Exits when it has ended already."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        threading.Thread(target=_watch, args=(parent, signal_number), daemon=True).start()
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(1)


def _watch(parent: int, signal_number: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal_number)


def main() -> None:
    """Bind to the parent, then become MODULE."""
    parent, signal_number, module, *arguments = sys.argv[1:]
    bind_to_parent(int(parent), int(signal_number))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
