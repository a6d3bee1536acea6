"""The same job on a Ray cluster (extra `lookonce[ray]`): workers read and judge, this process keeps ledger and parts.

The source is listed here and handed out with Ray Data in rounds; each worker reads its inputs itself and reaches the
services by their addresses. Rows come back in any order and go through the same ledger, so results and resuming are
those of a run on one machine. Who judges bytes that several workers hold is decided by one small actor. Images that
may be killing services are judged here, one by one, when no worker asks anything: at the end of a round.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import orjson

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import image_digest
from lookonce.moderation.batch.judge import Judge
from lookonce.moderation.batch.outcome import Failure, Outcome, Row, Timings
from lookonce.moderation.batch.poison_isolation import Suspected
from lookonce.moderation.batch.run import Run
from lookonce.moderation.batch.run_plan import Addresses, Plan, Served, connected, open_reader
from lookonce.moderation.batch.settings import ModerateSettings
from lookonce.moderation.batch.sources.items import FileAt, FileRange, Inline, Item, Locator, Unusable, WebUrl, items
from lookonce.moderation.batch.sources.reader import Reader
from lookonce.moderation.batch.work_loop import Tally
from lookonce.moderation.policy import Policy

ROUND = 20_000  # inputs handed out at once
ROUND_PARTS = 16  # and at most so many parts
BATCH = 32  # inputs in one task
_LOCATORS: dict[str, type[Any]] = {kind.__name__: kind for kind in (FileAt, FileRange, WebUrl, Inline, Unusable)}


def connect(address: str) -> Any:
    """Join the cluster: "auto", "local" (one started here), host:port or ray://host:10001. INVALID_ARGUMENT without."""
    try:
        import ray
    except ImportError as error:
        raise invalid("--ray needs Ray: pip install 'lookonce[ray]'", param="ray") from error
    if not ray.is_initialized():
        try:
            where = None if address == "local" else address
            ray.init(address=where, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise invalid(f"--ray {address}: no Ray cluster answers there", param="ray") from error
    return ray


def to_record(item: Item) -> dict[str, Any]:
    """An input as flat values, which Ray Data keeps in Arrow."""
    fields = {"url": "", "offset": 0, "size": 0, "data": b"", "message": ""} | vars(item.locator)
    return {"index": item.index, "name": item.name, "kind": type(item.locator).__name__, **fields}


def from_record(record: dict[str, Any]) -> Item:
    kind = _LOCATORS[str(record["kind"])]
    fields = {name: record[name] for name in kind.__dataclass_fields__}
    for name in ("offset", "size"):
        if name in fields:
            fields[name] = int(fields[name])
    locator: Locator = kind(**fields)
    return Item(int(record["index"]), str(record["name"]), locator)


class Claims:
    """An actor: who comes first with an image judges it."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def claim(self, digest: bytes) -> bool:
        """Whether the caller is the first."""
        first = digest not in self._seen
        self._seen.add(digest)
        return first


class Worker:
    """An actor of Ray Data: holds connections, reads and judges batches of inputs."""

    def __init__(
        self, policy: dict[str, Any], addresses: Addresses, served: Served, settings: dict[str, Any], claims: Any
    ) -> None:
        self._policy = Policy.model_validate(policy)
        self._claims = claims
        self._reader: Reader = open_reader(ModerateSettings(**settings), served.max_image_bytes)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._stack = AsyncExitStack()
        connection = connected(addresses, self._policy, served, trials=False)
        self._judge: Judge = self._await(self._stack.enter_async_context(connection))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """A row for each input, as JSON; or, instead of all, what ends the run: of an exception Ray would make text."""
        records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        try:
            return {"row": self._await(self._all([from_record(record) for record in records]))}
        except LookonceError as error:
            return {"row": [orjson.dumps({"ended": [error.kind.value, error.message]})]}

    async def _all(self, inputs: Sequence[Item]) -> list[bytes]:
        return list(await asyncio.gather(*(self._one(item) for item in inputs)))

    async def _one(self, item: Item) -> bytes:
        try:
            return _packed(*await _judge_item(self._reader, item, self._judge_once))
        except Suspected:
            return orjson.dumps({"suspect": item.index})

    async def _judge_once(self, data: bytes) -> tuple[Outcome | None, Timings]:
        if await asyncio.wrap_future(self._claims.claim.remote(image_digest(data)).future()):
            return await self._judge.judge(data)
        return None, Timings()

    def _await(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def run_on_cluster(made: Plan, run: Run, report: Callable[[Tally], None], stopped: Callable[[], bool]) -> Tally:
    """Judge every input without a row. Raises what ends the run; what is known then is recorded."""
    ray = connect(made.settings.ray or "auto")
    tally = Tally.of(run.begun)
    claims = ray.remote(num_cpus=0)(Claims).remote()
    waiting: dict[bytes, list[Row]] = {}  # rows whose image another worker judges
    inputs = items(made.source)
    size = min(ROUND, ROUND_PARTS * made.settings.part_rows)
    ended = False
    while not ended and not stopped():
        handed_out, ended = await asyncio.to_thread(_next_round, inputs, run, size)
        rows = _judged(ray, made, claims, handed_out)
        suspects: set[int] = set()
        while (batch := await asyncio.to_thread(next, rows, None)) is not None:
            suspects.update(each for each in batch if isinstance(each, int))
            await _record(run, [each for each in batch if not isinstance(each, int)], waiting, tally)
            report(tally)
            if stopped():
                return tally
        await _try([item for item in handed_out if item.index in suspects], made, run, waiting, tally)
        if ended:
            await run.listing_ended()
    return tally


def _next_round(inputs: Iterator[Item], run: Run, size: int) -> tuple[list[Item], bool]:
    """Inputs without a row, and whether there are no more. Blocking."""
    handed_out: list[Item] = []
    for item in inputs:
        run.listed(item.index + 1)
        if not run.has(item.index):
            handed_out.append(item)
        if len(handed_out) == size:
            return handed_out, False
    return handed_out, True


async def _try(suspects: Sequence[Item], made: Plan, run: Run, waiting: dict[bytes, list[Row]], tally: Tally) -> None:
    """Judge them here."""
    if not suspects:
        return
    reader = made.reader()
    try:
        async with connected(made.addresses, made.policy, made.served) as judge:
            for item in suspects:
                await _record(run, [await _judge_item(reader, item, judge.judge)], waiting, tally)
    finally:
        reader.close()


async def _judge_item(
    reader: Reader, item: Item, judge: Callable[[bytes], Awaitable[tuple[Outcome | None, Timings]]]
) -> tuple[Row, Outcome | None]:
    try:
        data, read_ms = await reader.read(item)
    except LookonceError as error:
        return Row(item.index, item.name, failure=Failure.of(error)), None
    outcome, timings = await judge(data)
    timings = replace(timings, read_ms=round(read_ms, 3))
    return Row(item.index, item.name, image_digest(data), timings=timings), outcome


def _judged(
    ray: Any, made: Plan, claims: Any, handed_out: Sequence[Item]
) -> Iterator[list[tuple[Row, Outcome | None] | int]]:
    """Rows, and indices of suspects. Blocking."""
    if not handed_out:
        return
    settings = made.settings.model_dump(mode="json", exclude_none=True)
    arguments = (made.policy.model_dump(mode="json"), made.addresses, made.served, settings, claims)
    judged = ray.data.from_items([to_record(item) for item in handed_out]).map_batches(
        Worker,
        batch_size=min(BATCH, max(1, len(handed_out) // made.settings.ray_actors)),
        compute=ray.data.ActorPoolStrategy(size=made.settings.ray_actors),
        fn_constructor_args=arguments,
        num_cpus=0.1,
    )
    for batch in judged.iter_batches(batch_size=None):
        yield [_unpacked(packed) for packed in batch["row"]]


async def _record(
    run: Run, batch: Sequence[tuple[Row, Outcome | None]], waiting: dict[bytes, list[Row]], tally: Tally
) -> None:
    rows: list[Row] = []
    outcomes: dict[bytes, Outcome] = {}
    for row, outcome in batch:
        if row.digest is None:
            rows.append(row)
            tally.count(row, None, fired=False, first=False)
        elif outcome is not None:
            outcomes[row.digest] = outcome
            earlier = await run.outcome(
                row.digest, row.index
            )  # this process's workers don't know what earlier ones left
            tally.count(row, outcome, fired=run.fired(outcome), first=earlier is None or not earlier[1])
            rows.append(row)
    for row, outcome in batch:
        if row.digest is not None and outcome is None:
            waiting.setdefault(row.digest, []).append(row)
    for digest in list(waiting):
        known = outcomes.get(digest)
        if known is None and (recorded := await run.outcome(digest, waiting[digest][0].index)) is not None:
            known = recorded[0]
        if known is not None:
            for row in waiting.pop(digest):
                rows.append(row)
                tally.count(row, known, fired=run.fired(known), first=False)
    if rows:
        await run.record(rows, outcomes)


def _packed(row: Row, outcome: Outcome | None) -> bytes:
    known = outcome.to_json().decode() if outcome is not None else None
    return orjson.dumps({"index": row.index, "row": row.to_json().decode(), "outcome": known})


def _unpacked(packed: bytes) -> tuple[Row, Outcome | None] | int:
    value = orjson.loads(packed)
    if "suspect" in value:
        return int(value["suspect"])
    if "ended" in value:
        kind, message = value["ended"]
        raise LookonceError(ErrorKind(kind), message)
    outcome = value["outcome"]
    row = Row.from_json(value["index"], value["row"])
    return row, Outcome.from_json(outcome) if outcome is not None else None
