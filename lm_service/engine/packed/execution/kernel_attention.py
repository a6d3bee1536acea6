"""Attention of a step's tokens by the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from lm_service.engine.packed.execution.batch import Batch
from lm_service.engine.packed.execution.kernel_plan import PrefillPlan, Split, SuffixPlan, plan_batch
from lm_service.engine.packed.prefix_cache.kv import KV
from lm_service.engine.packed.prefix_cache.pool import SuffixPool
from lm_service.engine.packed.prefix_cache.tree import Node
from lookonce.models.kernels.attention.structs import KVSpan, PrefillAttention, SuffixAttention
from lookonce.models.kernels.structs import Along, Call, Structs, addresses, joined
from lookonce.models.text_adapter import ModelShape

if TYPE_CHECKING:
    from lookonce.models.kernels.attention.kernels import AttentionKernels

_EVERY = slice(None)


class KernelAttention:
    """Makes each step's `Attend`. Memory for partial results is kept from step to step."""

    def __init__(self, kernels: AttentionKernels, shape: ModelShape, pool: SuffixPool) -> None:
        """`shape` has one stage, on the CPU."""
        self.kernels, self.shape, self.pool, self.sizes = kernels, shape, pool, kernels.heads.sizes
        (buffer,) = pool.buffers
        self.pool_keys, self.pool_values, self.pool_size = Along(buffer[:, 0]), Along(buffer[:, 1]), buffer.shape[2]
        self._partial = torch.empty(0)
        self._spans: WeakKeyDictionary[KV, Structs] = WeakKeyDictionary()

    def __call__(self, batch: Batch) -> AttendByKernels:
        """That of a batch whose suffixes are in `suffix_order`."""
        return AttendByKernels(self, *plan_batch(self.shape, self.pool, batch, self.kernels.heads))

    def partial(self, count: int) -> torch.Tensor:
        """Room for so many float32, not written yet."""
        if self._partial.numel() < count:
            self._partial = torch.empty(count)
        return self._partial

    def spans(self, nodes: Sequence[Node]) -> Structs:
        """KVSpan [layers, nodes]."""
        return joined([KVSpan.zeros(self.shape.layers, 0), *map(self._span, nodes)])

    def _span(self, node: Node) -> Structs:
        """KVSpan [layers, 1]. A KV stays where it is."""
        known = self._spans.get(node.kv)
        if known is None:
            (kv,) = node.kv.parts  # [layers, 2, kv_heads, T, d]
            tensors = {"keys": Along(kv[:, 0]), "values": Along(kv[:, 1])}
            known = KVSpan.fill(KVSpan.zeros(self.shape.layers), self.sizes, tokens=node.length, **tensors)
            known = self._spans[node.kv] = known.reshape(-1, 1)
        return known


class AttendByKernels:
    """An `Attend` of which kernels do all."""

    def __init__(self, own: KernelAttention, prefills: PrefillPlan | None, suffixes: SuffixPlan | None) -> None:
        self._kernels, self._first = own.kernels, 0 if prefills is None else len(prefills.places)
        self._prefills = None if prefills is None else _Prefills(own, prefills)
        self._suffixes = None if suffixes is None else _Suffixes(own, suffixes)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        self._kernels.run(self.calls(q, k, v, out, slice(layer, layer + 1))[0])
        return out

    def calls(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layers: slice = _EVERY
    ) -> Structs:
        """See `Attend`."""
        found = []
        if self._prefills is not None:
            found.append(self._prefills.calls(q, k, v, out, layers))
        if self._suffixes is not None:
            if self._first:
                q, k, v, out = (x[self._first :] for x in (q, k, v, out))
            found.append(self._suffixes.calls(q, k, v, out, layers))
        return found[0] if len(found) == 1 else joined(found)


class _Prefills:
    """Stores new keys and values of prefixes and attends from their tokens."""

    def __init__(self, own: KernelAttention, plan: PrefillPlan) -> None:
        self._kernel, self._plan = own.kernels.prefill, plan
        self._sizes = {**own.sizes, "tokens": len(plan.places)}
        self._spans = own.spans([node for span in plan.spans for node in (*span.ancestors, span.node)])
        self._structs = PrefillAttention.fill(
            PrefillAttention.zeros(own.shape.layers),
            {"span_count": self._spans.shape[1]},
            tokens=len(plan.places),
            spans=Along(self._spans),
            item_count=len(plan.items),
            items=plan.items,
            places=plan.places,
            barrier=own.kernels.barrier(),
        )
        self._structs["item_count"][-1] = 0  # nothing of a prefill is read behind the last layer's keys and values

    def calls(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layers: slice = _EVERY
    ) -> Structs:
        """See `Attend`: [layers, 1]. In the last layer `out` is not written."""
        structs = self._structs[layers]
        structs["store_counter"] = structs["attend_counter"] = 0
        PrefillAttention.fill(structs, self._sizes, query=q, key=k, value=v, out=out)
        return _calls(self._kernel, [structs])


class _Suffixes:
    """Stores new keys and values of suffixes and attends from their tokens."""

    def __init__(self, own: KernelAttention, plan: SuffixPlan) -> None:
        self._kernel, suffixes = own.kernels.attend, plan.suffixes
        partial_count = max(split.partial for split in plan.splits)
        partial = own.partial(partial_count)
        self._sizes = {**own.sizes, "total": len(suffixes.visible)}
        sizes = {
            **self._sizes,
            "pool_size": own.pool_size,
            "partial_count": partial_count,
            "mask_count": len(suffixes.masks),
            "seen_places": len(suffixes.visible) + 1,
            "seen_count": int(plan.seen[-1]),
        }
        structs = SuffixAttention.fill(
            SuffixAttention.zeros(own.shape.layers),
            sizes,
            pool_keys=own.pool_keys,
            pool_values=own.pool_values,
            pool_rows=suffixes.rows,
            visible=suffixes.visible,
            mask_rows=suffixes.mask_rows,
            masks=suffixes.masks,
            mask_width=suffixes.masks.shape[1],
            seen=plan.seen,
            seen_spans=plan.seen_spans,
            partial=partial,
            barrier=own.kernels.barrier(),
        )
        self._held = [plan, partial]  # what the structs point to
        self._splits = [self._split(own, joined([structs]), split) for split in plan.splits]
        self._splits[0]["stored"] = len(suffixes.visible)

    def _split(self, own: KernelAttention, structs: Structs, split: Split) -> Structs:
        spans = own.spans([span.node for span in split.spans])
        self._held.append(spans)
        return SuffixAttention.fill(
            structs,
            {"span_count": len(split.spans)},
            item_count=len(split.items),
            begin=split.begin,
            end=split.end,
            spans=Along(spans),
            items=split.items,
            splits=split.splits,
        )

    def calls(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layers: slice = _EVERY
    ) -> Structs:
        """See `Attend`: [layers, splits]."""
        for split in self._splits:
            structs = split[layers]
            structs["shared_counter"] = structs["own_counter"] = 0
            SuffixAttention.fill(structs, self._sizes, query=q, key=k, value=v, out=out)
        return _calls(self._kernel, [split[layers] for split in self._splits])


def _calls(kernel: int, structs: list[Structs]) -> Structs:
    """Of a kernel with arrays of structs [layers]: Call [layers, arrays]. Each is for once."""
    calls = Call.zeros(len(structs[0]), len(structs))
    calls["function"] = kernel
    for number, each in enumerate(structs):
        calls["struct"][:, number] = addresses(each)
    return calls
