"""Background tasks whose failure is never silent. Tasks begin here or in an `asyncio.TaskGroup`, and are given up here;
`tests/test_architecture.py` holds that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, Future
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

import structlog

from lookonce.core.errors import LookonceError

FIRST_PAUSE, LAST_PAUSE = 1.0, 30.0
"""Seconds before work that failed is begun again; doubles."""
T = TypeVar("T")
log = structlog.get_logger(__name__)


def start_task(
    work: Coroutine[Any, Any, T], *, awaited: bool = True, context: Context | None = None
) -> asyncio.Task[T]:
    """A task of the running loop. What nobody foresaw is logged the moment it is raised, whoever awaits the task.

    `awaited`: somebody takes the task's result, and with it the errors of ours; if not, these are logged, too."""
    task = asyncio.get_running_loop().create_task(work, context=context)
    task.add_done_callback(partial(_report, name=_name(work), foreseen=awaited))
    return task


def keep_running(make: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """A task for work that goes on until it is cancelled. When it fails, that is logged, and it is begun again."""
    return start_task(_again_and_again(make), awaited=False)


def run_in(executor: Executor, function: Callable[..., Any], *args: Any) -> None:
    """Have `function` called in a thread, for nobody who waits; a failure is logged."""
    executor.submit(function, *args).add_done_callback(partial(_report, name=_name(function), foreseen=False))


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their end. What nobody foresaw was logged when it was raised."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def gather_or_end(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, or the first failure, which ends the others."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [start_task(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _again_and_again(make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    pause = FIRST_PAUSE
    while True:
        began = asyncio.get_running_loop().time()
        try:
            await make()
            return
        except Exception:  # the edge of background work: it must outlive any fault
            log.exception("background work failed, it begins again", work=_name(make), seconds=pause)
        if asyncio.get_running_loop().time() - began > LAST_PAUSE:
            pause = FIRST_PAUSE
        await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE)


def _name(work: Any) -> str:
    return str(getattr(getattr(work, "func", work), "__qualname__", "task"))  # `func`: of a partial


def _report(done: asyncio.Task[Any] | Future[Any], *, name: str, foreseen: bool) -> None:
    error = None if done.cancelled() else done.exception()
    if error is None or (foreseen and isinstance(error, LookonceError)):
        return
    log.error("a task failed", task=name, exc_info=error)
