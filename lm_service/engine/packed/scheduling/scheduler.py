"""Who computes what in the next step, and whose KV lies where: admission, prefixes, growth, preemption.

A sequence is admitted when its prefix has been found or given room, and its suffix a slot. Sequences whose prefix
another one is filling wait for it. When the pool is full the youngest sequence steps back: its KV is kept as a prefix
if there is room, else computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.pool import SuffixPool
from lm_service.engine.packed.prefix_cache.states import StatePool
from lm_service.engine.packed.prefix_cache.tree import Node, PrefixCache
from lm_service.engine.packed.scheduling.batch import (
    Batch,
    Counters,
    FairQueue,
    PrefillChunk,
    Prefills,
    PrefixPrefill,
    StepBudget,
    SuffixChunk,
)
from lm_service.engine.packed.scheduling.prefix_policy import HEADROOM, PrefixPolicy, QuestionPrefixes
from lm_service.engine.packed.scheduling.sequence import Request, Sequence, Status
from lm_service.engine.types import EmbeddingSource
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.models.text_adapter import ModelShape


class Scheduler:
    """Waiting and running sequences over a pool and a prefix cache."""

    def __init__(
        self,
        shape: ModelShape,
        pool: SuffixPool,
        states: StatePool,
        cache: PrefixCache,
        options: PackedOptions,
        *,
        native: bool,
        load: Callable[[PrefixPrefill], None],
        fail: Callable[[Sequence, LookonceError], None],
    ) -> None:
        """`load` is asked for a prefill's embeddings (`loaded` answers); `fail` is told of sequences that cannot go on.
        `native`: compiled kernels attend, to which a short prefix more or less is nothing."""
        self.queue = FairQueue()
        self.running: list[Sequence] = []  # oldest first
        self.prefills = Prefills(cache, shape.rules.both_ways if shape.rules is not None else None)
        self.admitted: list[Sequence] = []  # since somebody last looked
        self.counters = Counters()
        self.budget = StepBudget(options)
        self._shape, self._pool, self._states = shape, pool, states
        self._cache, self._options = cache, options
        self._prefix_policy = PrefixPolicy(cache, options, pool.slab_tokens, native=native, rules=shape.rules)
        self._question_prefixes = QuestionPrefixes(cache)
        self._load, self._fail = load, fail
        self._was_exclusive = False  # the last step was one request's
        self._version = 0  # of the tree's shape, for sequences' paths
        cache.on_split = self._on_split

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        sequence.request.present += 1
        self.queue.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free what it holds."""
        if sequence.status is Status.DONE:
            return
        if sequence.status is Status.WAITING:
            self._unblock(sequence)
            self.queue.remove(sequence)
        else:
            self.running.remove(sequence)
            self._free(sequence)
        sequence.status = Status.DONE
        sequence.request.present -= 1
        if not sequence.request.present:
            self._question_prefixes.release(sequence.request)

    def finish(self, sequence: Sequence) -> None:
        """`remove`, keeping its KV for a next turn if that is wanted."""
        if sequence.request.kept:
            self._keep_suffix(sequence)
        self.remove(sequence)

    def fail(self, sequence: Sequence, error: LookonceError) -> None:
        """`remove`, and tell."""
        if sequence.status is not Status.DONE:
            self.remove(sequence)
            self._fail(sequence, error)

    def poisoned(self, sequence: Sequence) -> None:
        """Its numbers are not finite: nobody may find or inherit them. What is whole of its prefix stays: the text
        before an image is that of all others."""
        if sequence.slot is not None:
            self._pool.kv(sequence.slot).zero_()
        path = sequence.leaf.path() if sequence.leaf is not None else []
        suspect = next((node for node in path if node.images or not node.is_finite()), None)
        if suspect is not None:
            self._cache.detach(suspect)

    def loaded(self, prefill: PrefixPrefill, source: EmbeddingSource, load_ms: float) -> None:
        """A prefill's embeddings are here."""
        prefill.loading = False
        for sequence in self._users(prefill.node):
            if sequence.pending and sequence.admissions == 1:
                sequence.timings.embedding = source
                sequence.timings.load_ms = max(sequence.timings.load_ms, load_ms)

    def fail_prefill(self, prefill: PrefixPrefill, error: LookonceError) -> None:
        """A prefill cannot be finished; neither can those who need it. Those next in line who would come to it are told
        at once; to a private node nobody else comes."""
        node = prefill.node
        prefix = np.concatenate([part.content for part in node.path()], axis=1)
        waiting = [
            sequence
            for sequence in self.queue
            if sequence.blocked_on is node
            or (
                not node.private
                and (sequence.owner is None) == (prefill.owner is None)
                and np.array_equal(sequence.content.cut(0, node.end), prefix)
            )
        ]
        for sequence in [*self._users(node), *waiting]:
            self.fail(sequence, error)
        self._cache.detach(node)
        self.prefills.drop_unwanted()

    def schedule(self) -> Batch:
        """The next step. Decodes go first, prefills share what the token budget leaves."""
        self.prefills.drop_unwanted()
        self._admit()
        preemptions = self.counters.preemptions
        decodes, prefilling = self._ready()
        if not decodes and not prefilling and self.counters.preemptions > preemptions:
            self._admit()  # those who stepped back for want of a longer slot return at once
            decodes, prefilling = self._ready()
        self.prefills.drop_unwanted()  # of those who stepped back
        turn = self._whose_turn([*decodes, *prefilling])
        if turn is not None and (shared := self.prefills.first_shared(turn)) is not None:
            return Batch(prefills=[PrefillChunk.of(shared, self._options.burst_tokens)])
        decodes = [sequence for sequence in decodes if sequence.owner is turn]
        prefilling = [sequence for sequence in prefilling if sequence.owner is turn]
        budget = self.budget.tokens(len(decodes)) if turn is None else self._options.burst_tokens
        batch = Batch(suffixes=[SuffixChunk(sequence, 1) for sequence in decodes])
        for sequence in prefilling:
            if budget <= 0:
                break
            count = sequence.next_chunk(budget)
            batch.suffixes.append(SuffixChunk(sequence, count))
            budget -= count
        budget = self.prefills.take(batch, budget, turn)
        if turn is None:
            self._follow(batch, budget)
        for suffix in batch.suffixes:
            self._refresh_path(suffix.sequence)  # not before: who was let in last may have cut a node
        return batch

    def _follow(self, batch: Batch, budget: int) -> None:
        """Let those take part in a step who wait for nothing but what it completes: in every layer, prefixes are stored
        before anybody looks at them."""
        following: set[Sequence] = set()
        complete = batch.completes
        while complete and budget > 0:
            self._admit(complete)
            left = self.prefills.take(batch, budget, None)
            complete = batch.completes
            for sequence in self.running:
                if left > 0 and sequence not in following and self._ready_after(sequence, complete):
                    following.add(sequence)
                    self._start(sequence)
                    batch.suffixes.append(SuffixChunk(sequence, sequence.next_chunk(left)))
                    left -= batch.suffixes[-1].count
            if left == budget:
                return
            budget = left

    def _ready_after(self, sequence: Sequence, complete: Collection[int]) -> bool:
        """Whether it can begin its suffix in a step that completes the nodes of these numbers. What is to be copied
        must be there before."""
        return (
            bool(sequence.pending)
            and sequence.owner is None
            and all(node.id in complete and node.id not in sequence.inlined for node in sequence.pending)
        )

    def computed(self, batch: Batch) -> None:
        """Count a batch as done."""
        for chunk in batch.prefills:
            self.prefills.computed(chunk)
            self.counters.prefill_tokens += chunk.count
        for suffix in batch.suffixes:
            self._started(suffix.sequence)
            if suffix.sequence.computed >= suffix.sequence.prompt_length:
                self.counters.decode_tokens += suffix.count
            else:
                self.counters.prefill_tokens += suffix.count
            suffix.sequence.computed += suffix.count

    def _whose_turn(self, ready: list[Sequence]) -> Request | None:
        """A step is for one request that shares none, the oldest of them first, or (None) for all others together; the
        two take turns."""
        owners = [sequence.owner for sequence in ready]
        owners += [prefill.owner for prefill in self.prefills if prefill.ready]
        exclusive = [owner for owner in owners if owner is not None]
        self._was_exclusive = bool(exclusive) and not (self._was_exclusive and None in owners)
        return min(exclusive, key=lambda request: request.arrived) if self._was_exclusive else None

    def _ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that can compute: those that decode, with room for a token, and those that prefill."""
        for sequence in list(self.running):
            if sequence.status is Status.RUNNING and self._started(sequence) and sequence.decoding:
                self._ensure_room(sequence)
        decodes: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            if not sequence.pending:
                (decodes if sequence.decoding and sequence.remaining == 1 else prefilling).append(sequence)
        return decodes, prefilling

    def _admit(self, complete: Collection[int] = ()) -> None:
        """As many as there are places for; nodes of the numbers in `complete` count as filled."""
        admitted = True
        while admitted and len(self.running) < self._options.max_running:
            admitted = False
            for sequence in self.queue.heads():
                if len(self.running) >= self._options.max_running:
                    return
                node = sequence.blocked_on
                if node is not None and node.building and not node.detached and node.id not in complete:
                    continue
                self._unblock(sequence)
                if self._try_admit(sequence, complete):
                    admitted = True
                elif sequence.blocked_on is None and (self.running or self.prefills):
                    return  # it keeps its turn: none that needs less may pass it over for ever
                elif sequence.blocked_on is None:
                    self.fail(sequence, self._too_large(sequence))
                    admitted = True
                    break

    def _try_admit(self, sequence: Sequence, complete: Collection[int]) -> bool:
        """Give a sequence its prefix and its slot; False, with nothing taken, when it must wait."""
        end = sequence.prompt_length if sequence.trie is not None else sequence.length
        content = sequence.content_until(end)
        until, exclusive = self._prefix_policy.look_until(sequence, end), sequence.owner is not None
        found, building = self._cache.match(content, until, complete, exclusive=exclusive)
        if building is None:
            found, building = self._question_prefixes.find(sequence, found, complete)
        if building is not None:
            building.waiters += 1
            sequence.blocked_on = building
            return False
        self._cache.acquire(found)
        created = self._prefix_policy.create_nodes(sequence, found, end)
        if created is None:
            self._cache.release(found)
            return False
        leaf = created[-1] if created else found
        # question prefixes change nothing of what is enough: they are copied, too, or not part of the suffix
        copied = sum(node.length for node in self._prefix_policy.worth_copying(leaf))
        answer = sequence.answer
        slot = self._pool.allocate(copied + sequence.length - leaf.end + (HEADROOM if answer is not None else 0))
        state = self._states.allocate() if slot is not None and self._shape.states else None
        if slot is not None and state is None and self._shape.states:
            self._pool.free(slot)
            slot = None
        if slot is None:
            for node in reversed(created):
                self._cache.detach(node)
            self._cache.release(found)
            return False
        created += self._question_prefixes.create(sequence, leaf)
        leaf = created[-1] if created else found
        self._cache.acquire(leaf)
        self._cache.release(found)
        self.queue.pop(sequence)
        self.running.append(sequence)
        self.admitted.append(sequence)
        sequence.leaf, sequence.leaf_end, sequence.slot, sequence.state = leaf, leaf.end, slot, state
        sequence.pending = [*(node for node in found.path() if node.building), *created]
        sequence.inlined = {node.id for node in self._prefix_policy.worth_copying(leaf)}
        sequence.computed, sequence.inlined_tokens, sequence.path_version = leaf.end, 0, -1
        sequence.note_admission()
        sequence.note_reuse(found.end)
        self._count_hit(sequence)
        for node in created:
            prefill = self.prefills.add(node, sequence)
            if prefill.loading:
                self._load(prefill)
        if not sequence.pending:
            self._start(sequence)
        return True

    def _started(self, sequence: Sequence) -> bool:
        """Whether its prefix is filled; if it just came to be, its suffix is begun."""
        if sequence.pending:
            sequence.pending = [node for node in sequence.pending if node.building]
            if not sequence.pending:
                self._start(sequence)
        return not sequence.pending

    def _start(self, sequence: Sequence) -> None:
        """Copy short nodes of its prefix into its suffix: cheaper than a product of their own in every layer."""
        leaf, slot = sequence.leaf, sequence.slot
        if leaf is None or slot is None or sequence.inlined_tokens:
            return
        at = 0
        for node in leaf.path():
            if node.id in sequence.inlined:
                self._pool.kv(slot).cut(at, at + node.length).copy_(node.kv)
                at += node.length
        sequence.inlined_tokens = at

    def _ensure_room(self, sequence: Sequence) -> None:
        """A slot with room for the tokens to feed, from others if need be; else the sequence steps back itself."""
        length = sequence.suffix_length
        wanted = length + sequence.remaining
        while sequence.slot is not None and wanted > sequence.slot.capacity:
            grown = self._pool.grow(sequence.slot, length, wanted)
            if grown is not None:
                sequence.slot = grown
                return
            fits = self._pool.capacity_for(wanted) <= self._pool.slab_tokens
            self._preempt(self.running[-1] if fits else sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Free what a sequence holds and let it wait at the front; it goes on where it stopped."""
        if sequence.answer is not None:
            self._keep_suffix(sequence)
        sequence.sums = [0.0] * len(sequence.sums)
        self.running.remove(sequence)
        self._free(sequence)
        sequence.status = Status.WAITING
        self.queue.push_front(sequence)
        self.counters.preemptions += 1

    def _keep_suffix(self, sequence: Sequence) -> None:
        leaf, slot = sequence.leaf, sequence.slot
        if leaf is None or slot is None or sequence.pending or leaf.detached or sequence.computed <= leaf.end:
            return
        if not self._prefix_policy.worth_keeping(sequence.computed - leaf.end):
            return
        kv = self._pool.kv(slot).cut(sequence.inlined_tokens, sequence.suffix_length)
        self._cache.insert(leaf, sequence.content_between(leaf.end, sequence.computed), kv, sequence.state)

    def _free(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._pool.free(sequence.slot)
        if sequence.state is not None:
            self._states.free(sequence.state)
        if sequence.leaf is not None:
            self._cache.release(sequence.leaf)
        sequence.slot, sequence.state, sequence.leaf, sequence.leaf_end = None, None, None, 0
        sequence.pending, sequence.path, sequence.order = [], (), ()
        sequence.inlined, sequence.inlined_tokens, sequence.computed = set(), 0, 0

    def _unblock(self, sequence: Sequence) -> None:
        if sequence.blocked_on is not None:
            sequence.blocked_on.waiters -= 1
            self._cache.settle(sequence.blocked_on)
            sequence.blocked_on = None

    def _users(self, node: Node) -> list[Sequence]:
        return [sequence for sequence in self.running if node in sequence.pending]

    def _refresh_path(self, sequence: Sequence) -> None:
        if sequence.path_version != self._version and sequence.leaf is not None:
            sequence.path = tuple(node for node in sequence.leaf.path() if node.id not in sequence.inlined)
            sequence.order = tuple(node.id for node in sequence.path)
            sequence.path_version = self._version

    def _on_split(self, upper: Node, lower: Node) -> None:
        self._version += 1
        for sequence in self.running:
            if lower.id in sequence.inlined:
                sequence.inlined.add(upper.id)

    def _count_hit(self, sequence: Sequence) -> None:
        if sequence.admissions == 1:
            if sequence.timings.prefix_hit:
                self.counters.prefix_hits += 1
            else:
                self.counters.prefix_misses += 1

    def _too_large(self, sequence: Sequence) -> LookonceError:
        return LookonceError(
            ErrorKind.CONTEXT_LENGTH_EXCEEDED,
            f"{sequence.length} tokens need more KV memory than there is: "
            f"prefix_bytes {self._cache.budget}, kv_bytes {self._pool.bytes}, {self._shape.token_bytes} bytes a token"
            + (f", {self._shape.state_bytes} a recurrent state" if self._shape.states else ""),
        )
