"""What the packed engine is allowed to use. Derived sizes are properties; nothing here touches a device."""

from __future__ import annotations

from dataclasses import dataclass

from lookonce.core.errors import invalid

_SHARE_OF_FREE = 0.25  # of free memory, for running sequences; as much again for prefixes
_LEAST_BYTES = 64 << 20


@dataclass(frozen=True)
class PackedOptions:
    """Bounds of the engine. Byte budgets of None take a quarter of the memory that is free at start."""

    max_running: int = 128  # sequences in a step
    max_waiting: int = 1024  # requests that wait for their first step; more are refused as OVERLOADED
    kv_bytes: int | None = None  # KV of running sequences beyond their shared prefix
    prefix_bytes: int | None = None  # KV of shared prefixes, kept from one request to the next
    step_tokens: int = 512  # most prefill tokens of a step in which someone decodes
    burst_tokens: int = 4096  # most prefill tokens of a step in which nobody does
    step_seconds: float = 1.0  # prefill tokens are fewer where a step would take longer; see `StepBudget`
    slab_tokens: int = 4096  # tokens of one slab of the pool, and the longest suffix of a sequence
    inline_tokens: int | None = None  # prefixes shorter than this are copied into each sequence, not shared; see below
    long_suffix_tokens: int = 256  # unshared text from this length on becomes a prefix of its own
    question_prefix_tokens: int | None = None  # what questions begin with alike is shared if that spares so many
    keep_answers: bool = True  # keep the KV of finished answers, for the next turn of a chat
    context_tokens: int | None = None  # longest prompt and answer together; None: what the model was made for
    native: bool = True  # attend by kernels compiled for this CPU, where the model's heads and dtype have some
    batch_invariant: bool | None = None  # rows of products don't depend on how many there are; None: found out at start

    def inline_below(self, *, native: bool) -> int:
        """`inline_tokens`, or what is faster: compiled kernels share the shortest prefix, while torch's operations take
        longer to merge a short one than to see it in every sequence."""
        if self.inline_tokens is not None:
            return self.inline_tokens
        return 1 if native else 64

    def question_prefixes_from(self, device_type: str) -> int:
        """`question_prefix_tokens`, or about what a node of its own costs: little with compiled kernels, else
        operations in every layer."""
        if self.question_prefix_tokens is not None:
            return self.question_prefix_tokens
        return 16 if device_type == "cpu" else 1024

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "step_tokens", "burst_tokens"):
            if getattr(self, name) < 1:
                raise invalid(f"{name} must be at least 1, got {getattr(self, name)}", param=name)
        if self.slab_tokens < 64 or self.slab_tokens & (self.slab_tokens - 1):
            raise invalid(
                f"slab_tokens must be a power of two of at least 64, got {self.slab_tokens}", param="slab_tokens"
            )

    def budget(self, name: str, free: int) -> int:
        """Bytes of `kv_bytes` or `prefix_bytes`, where so many are free."""
        wanted: int | None = getattr(self, name)
        if wanted is not None:
            return wanted
        return max(_LEAST_BYTES, int(free * _SHARE_OF_FREE))
