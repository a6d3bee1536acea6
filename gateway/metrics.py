"""Counters of the gateway, beside those of its stores, in the process's Prometheus registry."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
REQUESTS = Counter("lookonce_gateway_requests", "Requests answered.", ("route", "method", "status"))
REQUEST_SECONDS = Histogram(
    "lookonce_gateway_request_seconds", "From request to last byte.", ("route",), buckets=_SECONDS
)
IN_FLIGHT = Gauge("lookonce_gateway_in_flight", "Requests being worked on.")
RATE_LIMITED = Counter("lookonce_gateway_rate_limited", "Requests answered 429 because of their key's limits.")
REJECTED = Counter("lookonce_gateway_rejected", "Requests answered 429 because the gateway was full.")
DISCONNECTS = Counter("lookonce_gateway_disconnects", "Clients that went away before their answer was complete.")
CONNECTIONS = Gauge("lookonce_gateway_connections", "Open connections of clients.")
CONNECTIONS_ENDED = Counter(
    "lookonce_gateway_connections_ended",
    "Connections ended because their client did not do its part: headers (too slow), silent, unread, pipelined, "
    "malformed, or crowded (another needed the room).",
    ("reason",),
)
ENCODES = Counter("lookonce_gateway_encodes", "Encode calls, by what the vision service did.", ("outcome",))
ANSWERS = Counter("lookonce_gateway_answers", "Answers, by what was reused.", ("embedding", "prefix"))
FIRST_TOKEN_SECONDS = Histogram(
    "lookonce_gateway_first_token_seconds", "Engine time to the first token.", buckets=_SECONDS
)
TOKENS = Counter("lookonce_gateway_tokens", "Tokens, by kind: prompt, cached or completion.", ("kind",))
VECTORS = Counter("lookonce_gateway_vectors", "Inputs made into vectors, by whether they were kept.", ("outcome",))
VARIANT_REQUESTS = Counter(
    "lookonce_gateway_variant_requests", "Requests to the language services, by variant.", ("variant", "outcome")
)
VARIANT_SECONDS = Histogram(
    "lookonce_gateway_variant_seconds", "From a request to its last token, by variant.", ("variant",), buckets=_SECONDS
)
VARIANT_ENCODES = Counter("lookonce_gateway_variant_encodes", "Encode calls, by variant.", ("variant", "outcome"))
RETRIES = Counter("lookonce_gateway_retries", "Second tries, by the kind of the first one's failure.", ("kind",))
