"""Torch's work outside the thread that computes: in a thread of its own, which ends with it.

OpenMP's library (libgomp) keeps a team of threads for every thread that ever computed in parallel. Once all teams of a
process together have more threads than it has cores, they sleep between two products instead of waiting awake, and a
decode step of 3 ms takes 6. A team goes with its thread; so each service keeps one, that of the thread that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Pause = Callable[[], None]
"""To be called now and then by a forward that takes long: others have a turn. Raises what ends the forward."""


def run_in_omp_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread that is gone when this returns; its result or exception. Blocks."""
    with ThreadPoolExecutor(1, thread_name_prefix="omp") as thread:
        return thread.submit(function, *args, **kwargs).result()


@contextmanager
def lone_workers(most: int) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch uses here, at `most` so many, each of which computes alone: for small pieces of work.

    Where cores are busy, products that share each piece out wait for each other far longer than they compute. How many
    threads torch uses elsewhere is as before when this is entered."""
    import torch

    threads = torch.get_num_threads()
    count = max(1, min(most, threads))
    begun = Barrier(count + 1)

    def compute_alone() -> None:
        torch.set_num_threads(1)  # of this thread, and of threads that first compute from now on
        begun.wait()

    with ThreadPoolExecutor(count, thread_name_prefix="lone") as pool:
        for _ in range(count):
            pool.submit(compute_alone)
        begun.wait()
        torch.set_num_threads(threads)
        yield pool
