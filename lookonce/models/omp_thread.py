"""Torch's work outside the thread that computes: in a thread of its own, which ends with it.

OpenMP's library (libgomp) keeps a team of threads for every thread that ever computed in parallel. Once all teams of a
process together have more threads than it has cores, they sleep between two products instead of waiting awake, and a
decode step of 3 ms takes 6. A team goes with its thread; so each service keeps one, that of the thread that computes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Pause = Callable[[], None]
"""To be called now and then by a forward that takes long: others have a turn. Raises what ends the forward."""


def run_in_omp_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread that is gone when this returns; its result or exception. Blocks."""
    with ThreadPoolExecutor(1, thread_name_prefix="omp") as thread:
        return thread.submit(function, *args, **kwargs).result()
