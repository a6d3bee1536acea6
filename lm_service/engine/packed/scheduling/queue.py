"""Who is admitted next: clients take turns, and within a client its images do; each image's questions keep their order.

One client with a thousand questions delays another's single one by a turn, not by a thousand.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from lm_service.engine.packed.scheduling.sequence import Sequence


class FairQueue:
    """Sequences that wait. Preempted ones come back first, in the order they were put back."""

    def __init__(self) -> None:
        self._preempted: deque[Sequence] = deque()
        self._clients: OrderedDict[str, OrderedDict[bytes, deque[Sequence]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for groups in self._clients.values():
            for line in groups.values():
                yield from line

    def push(self, sequence: Sequence) -> None:
        """To the end of its line."""
        groups = self._clients.setdefault(sequence.request.client, OrderedDict())
        groups.setdefault(sequence.group, deque()).append(sequence)
        self._count += 1

    def push_front(self, sequence: Sequence) -> None:
        """Before all others."""
        self._preempted.appendleft(sequence)
        self._count += 1

    def heads(self) -> Iterator[Sequence]:
        """The first of every line, in the order of their turns, as of now."""
        if self._preempted:
            yield self._preempted[0]
        lines = [list(groups.values()) for groups in self._clients.values()]
        for turn in range(max(map(len, lines), default=0)):
            for client in lines:
                if turn < len(client) and client[turn]:
                    yield client[turn][0]

    def pop(self, sequence: Sequence) -> None:
        """Take out a head; its client's and its image's next turns come after those of the others."""
        if self._preempted and self._preempted[0] is sequence:
            self._preempted.popleft()
        else:
            groups = self._clients[sequence.request.client]
            groups[sequence.group].popleft()
            groups.move_to_end(sequence.group)
            self._clients.move_to_end(sequence.request.client)
            self._tidy(sequence)
        self._count -= 1

    def remove(self, sequence: Sequence) -> None:
        """Take out one that no longer wants to be admitted."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            self._clients[sequence.request.client][sequence.group].remove(sequence)
            self._tidy(sequence)
        self._count -= 1

    def _tidy(self, sequence: Sequence) -> None:
        groups = self._clients[sequence.request.client]
        if not groups[sequence.group]:
            del groups[sequence.group]
        if not groups:
            del self._clients[sequence.request.client]
