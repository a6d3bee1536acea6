"""Prometheus's text format, read into sums that a person can look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Reading:
    """All samples of one or more processes at one moment."""

    seconds: float  # on a clock that only grows
    samples: dict[str, list[tuple[Labels, float]]] = field(default_factory=dict)

    def sum(self, name: str, **labels: str) -> float:
        """All samples of a name with these labels, added up."""
        return sum(value for found, value in self.samples.get(name, ()) if labels.items() <= found.items())

    def without(self, label: str, values: frozenset[str]) -> Reading:
        """The same but for the samples that have one of the values."""
        kept = {
            name: [sample for sample in samples if sample[0].get(label) not in values]
            for name, samples in self.samples.items()
        }
        return Reading(self.seconds, kept)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums of a name for each value of a label, the largest first."""
        sums: dict[str, float] = {}
        for found, value in self.samples.get(name, ()):
            key = found.get(label, "")
            sums[key] = sums.get(key, 0.0) + value
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def quantile(self, name: str, share: float, before: Reading | None = None) -> float | None:
        """Upper bound of the bucket that holds the quantile, of what was observed since `before`; None: nothing was."""
        buckets = self._buckets(name)
        earlier = before._buckets(name) if before is not None else {}
        counts = {bound: count - earlier.get(bound, 0.0) for bound, count in buckets.items()}
        total = counts.get(float("inf"), 0.0)
        if total <= 0:
            return None
        return next(bound for bound, count in sorted(counts.items()) if count >= share * total)

    def _buckets(self, name: str) -> dict[float, float]:
        return {float(bound): value for bound, value in self.by(f"{name}_bucket", "le").items()}


def read(texts: Iterator[str] | list[str], seconds: float) -> Reading:
    """One reading of the /metrics texts of any number of processes. Raises ValueError for what is none."""
    reading = Reading(seconds)
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                reading.samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return reading
