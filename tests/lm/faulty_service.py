"""`python -m tests.lm.faulty_service ... FILE`: the language service, whose scheduler raises while FILE exists."""

from __future__ import annotations

import sys
from pathlib import Path

from lm_service.__main__ import run
from lm_service.settings import LanguageSettings
from lookonce.core.process import leave_after
from lookonce.core.settings import command


def plant(switch: Path) -> None:
    """Have every schedule that has somebody to serve raise while the file is there."""
    from lm_service.engine.packed.scheduling.scheduler import Scheduler

    schedule = Scheduler.schedule

    def faulty(self: Scheduler):
        if switch.exists() and (len(self.queue) or self.running):
            raise RuntimeError("secret detail")
        return schedule(self)

    Scheduler.schedule = faulty


if __name__ == "__main__":
    plant(Path(sys.argv.pop()))
    leave_after(command(LanguageSettings, run))
