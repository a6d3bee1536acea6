"""What Prometheus's text format says of a system: read into sums, and shown as one frame of `lookonce top`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lookonce.core.units import format_size

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


WATCHING = frozenset({"/healthz", "/readyz", "/health", "/version", "/metrics"})
"""Routes that are asked by those who watch, this command among them: no requests of users."""
_GOOD = {"ready": "green", "degraded": "yellow", "unavailable": "red", "unreachable": "red"}


def frame(url: str, readiness: dict[str, Any], now: Reading, before: Reading | None) -> Group:
    """Rates are over the time since `before`; without it, totals since the processes started. `readiness` is empty
    when the gateway doesn't answer."""
    now, before = now.without("route", WATCHING), before and before.without("route", WATCHING)
    return Group(
        _headline(url, readiness), _requests(now, before), _reuse(now, before), _services(now), _stores(now, before)
    )


def _headline(url: str, readiness: dict[str, Any]) -> Text:
    status = str(readiness.get("status", "unreachable"))
    line = Text.assemble(("lookonce ", "bold"), url, "  ", (status, _GOOD.get(status, "red")))
    for name, part in readiness.get("parts", {}).items():
        told = f"{part['serving']}/{part['configured']}" if isinstance(part, dict) else str(part)
        line.append(f"  {name.replace('_', ' ')} {told}")
    return line


def _requests(now: Reading, before: Reading | None) -> Table:
    table = _table("requests", "", "5xx", "429", "in flight", "p50", "p95", "first token p50", "p95")
    name = "lookonce_gateway_requests_total"
    failed = sum(value for status, value in _moved(now, before, name, "status").items() if status.startswith("5"))
    full = _moved(now, before, name, "status").get("429", 0.0)
    total = sum(_moved(now, before, name, "status").values())
    times = [
        now.quantile(histogram, share, before)
        for histogram in ("lookonce_gateway_request_seconds", "lookonce_gateway_first_token_seconds")
        for share in (0.5, 0.95)
    ]
    rates = [_rate(value, now, before) for value in (total, failed, full)]
    table.add_row("all", *rates, f"{now.sum('lookonce_gateway_in_flight'):g}", *map(_seconds, times))
    return table


def _reuse(now: Reading, before: Reading | None) -> Table:
    table = _table("reuse", "prefix hits", "cached tokens", "tokens in", "tokens out", "encodes", "of them forwards")
    tokens = _moved(now, before, "lookonce_gateway_tokens_total", "kind")
    prefixes = _moved(now, before, "lookonce_gateway_answers_total", "prefix")
    encodes = _moved(now, before, "lookonce_gateway_encodes_total", "outcome")
    table.add_row(
        "all",
        _share(prefixes.get("hit", 0.0), sum(prefixes.values())),
        _share(tokens.get("cached", 0.0), tokens.get("prompt", 0.0)),
        _rate(tokens.get("prompt", 0.0), now, before),
        _rate(tokens.get("completion", 0.0), now, before),
        _rate(sum(encodes.values()), now, before),
        _rate(encodes.get("miss", 0.0), now, before),
    )
    variants = _moved(now, before, "lookonce_gateway_variant_requests_total", "variant")
    for variant, count in variants.items() if len(variants) > 1 else ():
        table.add_row(f"variant {variant}", "", "", "", "", "", "", _rate(count, now, before))
    if len(variants) > 1:
        table.add_column("requests", justify="right")
    return table


def _services(now: Reading) -> Table:
    table = _table(
        "services", "running", "waiting", "prefix KV", "embeddings at hand", "patches waiting", "images under way"
    )
    if "lookonce_lm_running" in now.samples or "lookonce_vision_waiting_patches" in now.samples:
        table.add_row(
            "all",
            f"{now.sum('lookonce_lm_running'):g}",
            f"{now.sum('lookonce_lm_waiting'):g}",
            format_size(int(now.sum("lookonce_lm_prefix_bytes"))),
            format_size(int(now.sum("lookonce_lm_tensor_cache_bytes"))),
            f"{now.sum('lookonce_vision_waiting_patches'):g}",
            f"{now.sum('lookonce_vision_images_under_way'):g}",
        )
    else:
        table.add_row("no measurements", "give those of services elsewhere with --also http://HOST:PORT")
    return table


def _stores(now: Reading, before: Reading | None) -> Table:
    table = _table("stores", "hits", "values", "bytes", "errors", "evicted", "state")
    for namespace in sorted({found["namespace"] for found, _ in now.samples.get("lookonce_store_hits_total", ())}):
        hits = now.sum("lookonce_store_hits_total", namespace=namespace)
        misses = now.sum("lookonce_store_misses_total", namespace=namespace)
        degraded = now.sum("lookonce_store_degraded", namespace=namespace) > 0
        table.add_row(
            namespace,
            _share(hits, hits + misses),
            f"{now.sum('lookonce_store_entries', namespace=namespace):g}",
            format_size(int(now.sum("lookonce_store_bytes", namespace=namespace))),
            f"{now.sum('lookonce_store_errors_total', namespace=namespace):g}",
            f"{now.sum('lookonce_store_evictions_total', namespace=namespace):g}",
            Text("degraded", "yellow") if degraded else Text("ok", "green"),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _moved(now: Reading, before: Reading | None, name: str, label: str) -> dict[str, float]:
    """What each value of a label has gained since `before`. A process that was restarted starts from nothing."""
    earlier = before.by(name, label) if before is not None else {}
    return {key: max(value - earlier.get(key, 0.0), 0.0) for key, value in now.by(name, label).items()}


def _rate(gained: float, now: Reading, before: Reading | None) -> str:
    if before is None:
        return f"{gained:g}"
    return f"{gained / max(now.seconds - before.seconds, 1e-9):.1f}/s"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return "> 5 min" if value == float("inf") else f"< {value:g} s"
