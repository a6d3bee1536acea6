"""No task fails in silence: lookonce.core.tasks, and the questions of one request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.answers import Completion
from gateway.auth import Keyring
from gateway.conversation import Caller, Turn
from gateway.questions import OpenQuestion, Questions
from gateway.typed_questions import Asking
from lookonce.core import tasks
from lookonce.core.backoff import Backoff
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.tasks import end_tasks, keep_running, run_in, start_task
from protos.lookonce.v1 import language_pb2


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with capture_logs() as lines:
        yield lines


async def fails(error: Exception) -> None:
    raise error


def test_what_nobody_foresaw_is_logged_even_when_the_task_is_given_up(logged: list[Any]) -> None:
    async def run() -> None:
        task = start_task(fails(KeyError("lost")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await end_tasks(task)

    asyncio.run(run())
    assert [line["event"] for line in logged] == ["a task failed"]
    assert isinstance(logged[0]["exc_info"], KeyError) and logged[0]["task"] == "fails"


def test_errors_of_ours_are_logged_where_nobody_takes_them(logged: list[Any]) -> None:
    async def run() -> None:
        taken = start_task(fails(LookonceError(ErrorKind.NOT_FOUND, "taken")))
        with pytest.raises(LookonceError):
            await taken
        await asyncio.wait([start_task(fails(LookonceError(ErrorKind.NOT_FOUND, "nobody's")), awaited=False)])
        await end_tasks(start_task(asyncio.sleep(60)))

    asyncio.run(run())
    assert [str(line["exc_info"]) for line in logged] == ["nobody's"]


def test_a_thread_that_fails_for_nobody_is_logged(logged: list[Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        run_in(pool, int, "no number")
    assert [type(line["exc_info"]) for line in logged] == [ValueError]


def test_background_work_that_fails_is_begun_again(logged: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FIRST_PAUSE", 0.01)

    async def run() -> int:
        begun, going = [0], asyncio.Event()

        async def work() -> None:
            begun[0] += 1
            if begun[0] < 3:
                raise RuntimeError("the handler is closed")
            going.set()
            await asyncio.Event().wait()

        task = keep_running(work)
        async with asyncio.timeout(30):
            await going.wait()
        await end_tasks(task)
        return begun[0]

    assert asyncio.run(run()) == 3
    assert [line["event"] for line in logged] == ["background work failed, it begins again"] * 2


class Broken:
    """Answers that fail as nobody foresaw, but for the question "fine"."""

    async def complete(self, turns: tuple[Turn, ...], *_: Any) -> tuple[list[Completion], list[Any]]:
        if turns[0].parts[0] == "fine":
            finish = language_pb2.Finish(reason=language_pb2.STOP)
            return [Completion(text="yes", finish=finish)], []
        raise RuntimeError("the handler is closed")

    async def score(self, *_: Any) -> Any:
        return [language_pb2.ItemScores()], language_pb2.LanguageReceipt(), []  # fewer than were asked for


class Model:
    name = "m"


def test_a_question_that_fails_as_nobody_foresaw_is_answered_and_the_others_go_on(logged: list[Any]) -> None:
    sampling = language_pb2.SamplingParameters()
    questions = [
        OpenQuestion("0", (Turn("user", ("broken",)),), sampling),
        OpenQuestion("1", (Turn("user", ("fine",)),), sampling),
        *(Asking(lambda text: (Turn("user", (text,)),)).yes_no(name, "a", tell=False) for name in "23"),
    ]
    caller = Caller(Keyring([]).identify(None).tenant, "someone", 60.0)

    async def run() -> Any:
        async with asyncio.timeout(30):
            return await Questions(Broken(), Model(), concurrency=2).run_all(questions, caller)  # type: ignore[arg-type]

    outcomes = asyncio.run(run())
    assert [outcome.id for outcome in outcomes] == ["0", "1", "2", "3"]
    assert outcomes[1].fields["text"] == "yes"
    for outcome in (outcomes[0], *outcomes[2:]):
        assert (outcome.error.kind, outcome.error.message) == (ErrorKind.INTERNAL, "internal error")
    assert [line["event"] for line in logged] == ["a question failed"] * 2


async def test_pauses_grow_to_the_last_differ_and_add_what_was_asked_for(monkeypatch):
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("lookonce.core.backoff.asyncio.sleep", note)
    several = [Backoff(1.0, 8.0) for _ in range(200)]
    for attempt in range(6):
        pauses.clear()
        for backoff in several:
            await backoff.sleep()
        most = min(2.0**attempt, 8.0)
        assert min(pauses) >= 0.5 and 0.8 * most < max(pauses) <= most and len(set(pauses)) > 100
    pauses.clear()
    for told in (3.0, 60.0):
        await Backoff(1.0, 8.0).sleep(told)
    assert 3.5 <= pauses[0] <= 4.0 and 8.5 <= pauses[1] <= 9.0  # no longer than the last
