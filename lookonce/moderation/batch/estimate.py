"""--dry-run: a sample of the source judged, and what that says of the whole."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import islice

from lookonce.core.errors import LookonceError, invalid
from lookonce.moderation.batch.outcome import Failure, Outcome
from lookonce.moderation.batch.progress import duration
from lookonce.moderation.batch.run_plan import Plan, connected
from lookonce.moderation.batch.sources.items import Item, items
from lookonce.moderation.judging import judge

_WARM_UP = 0.25  # share of the sample that is not timed


async def estimate(made: Plan) -> str:
    """Lines for people. Raises INVALID_ARGUMENT when there are no images."""
    chosen = await asyncio.to_thread(_sample, made)
    if not chosen:
        raise invalid(f"{made.source.description} holds no images", param="source")
    reader = made.reader()
    outcomes: list[Outcome] = []
    waiting = iter(chosen)
    ends: list[float] = []
    bytes_read = 0
    try:
        async with connected(made.addresses, made.policy, made.served) as scorer:

            async def worker() -> None:
                nonlocal bytes_read
                for item in waiting:
                    try:
                        data, _ = await reader.read(item)
                    except LookonceError as error:
                        outcomes.append(Outcome(failure=Failure.of(error)))
                    else:
                        bytes_read += len(data)
                        outcomes.append((await scorer.judge(data))[0])
                    ends.append(time.perf_counter())

            began = time.perf_counter()
            workers = made.settings.under_way or made.served.under_way
            await asyncio.gather(*(worker() for _ in range(workers)))
    finally:
        reader.close()
    return _text(made, outcomes, _rate(began, ends), bytes_read)


def _sample(made: Plan) -> list[Item]:
    """Spread evenly over the source, or its beginning when its length isn't known. Blocking."""
    wanted, count = made.settings.sample, made.manifest.identity.count
    if count is None or count <= wanted:
        return list(islice(items(made.source), wanted))
    places = {round((number + 0.5) * count / wanted) for number in range(wanted)}
    return [item for item in items(made.source) if item.index in places]


def _rate(began: float, ends: list[float]) -> float:
    """Images a second, without the beginning."""
    skipped = int(len(ends) * _WARM_UP)
    start = ends[skipped - 1] if skipped else began
    return (len(ends) - skipped) / max(ends[-1] - start, 1e-6)


def _text(made: Plan, outcomes: list[Outcome], rate: float, size: int) -> str:
    count = made.manifest.identity.count
    good = [outcome for outcome in outcomes if outcome.failure is None]
    rules = made.policy.of("image")
    verdicts = [judge(rules, one.scores) for one in good]
    fired = Counter(rule for verdict in verdicts for rule, label in verdict.labels.items() if label)
    flagged = sum(verdict.flagged for verdict in verdicts)
    entries = "an unknown number of" if count is None else f"{count:,}"
    lines = [
        f"source     {made.source.description}: {entries} entries",
        f"policy     {len(rules)} rules, digest {made.manifest.identity.policy_digest[:12]}",
        f"models     {made.served.models.name}",
        f"sample     {len(outcomes)} images, {size / max(1, len(good)) / 1024:.0f} KiB each, {rate:.1f} a second",
    ]
    if count is not None:
        lines.append(f"estimate   {duration(count / rate)} for all; less where files are equal")
    if good:
        most = ", ".join(f"{rule} {number / len(good):.0%}" for rule, number in fired.most_common(5)) or "none"
        lines.append(f"flagged    {flagged / len(good):.0%} of the sample ({most})")
    if len(good) < len(outcomes):
        kinds = Counter(one.failure.kind for one in outcomes if one.failure is not None)
        lines.append("errors     " + ", ".join(f"{kind} {number}" for kind, number in kinds.items()))
    return "\n".join(lines)
