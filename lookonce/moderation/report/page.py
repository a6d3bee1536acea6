"""The page: one file, its style, script and images inside. What it shows is data to the script, never markup."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson

from lookonce.core.atomic_files import write_durably
from lookonce.moderation.report.collect import Collected, card, collect
from lookonce.moderation.report.thumbnails import thumbnails

_REPEATED = 50  # most repeated images listed
_STATIC = files("lookonce.moderation.report") / "static"


def write_report(results: Path, out: Path, *, gallery: int) -> Collected:
    """Write the page; what it was made of. Raises NOT_FOUND without results. Blocking."""
    collected = collect(results, gallery)
    wanted = {index: row["image_digest"] for index, row in collected.cards.items()}
    images = thumbnails(collected.manifest, wanted) if wanted else {}
    text = page(_content(collected, images))
    write_durably(out.expanduser().absolute(), lambda path: path.write_text(text, encoding="utf-8"))
    return collected


def page(content: dict[str, Any]) -> str:
    """The page over that content."""
    style, script, body = (
        (_STATIC / name).read_text(encoding="utf-8") for name in ("report.css", "report.js", "report.html")
    )
    policy = "; ".join((
        "default-src 'none'",
        "img-src data:",
        f"style-src {_hash(style)}",
        f"script-src {_hash(script)}",
        "base-uri 'none'",
        "form-action 'none'",
    ))  # fmt: skip
    data = orjson.dumps(content).decode("utf-8").replace("<", "\\u003c")
    for name, text in (("policy", policy), ("style", style), ("script", script), ("data", data)):
        body = body.replace("{{" + name + "}}", text, 1)
    return body


def _content(collected: Collected, images: dict[int, str]) -> dict[str, Any]:
    identity, policy = collected.manifest.identity, collected.manifest.policy
    return {
        "name": policy.name or "policy",
        "description": policy.description,
        "source": identity.source,
        "model": identity.models.name,
        "policy_digest": identity.policy_digest,
        "vision": identity.models.vision,
        "language": identity.models.language,
        "rows": collected.rows,
        "complete": collected.finished,
        "flagged": collected.flagged,
        "duplicates": collected.duplicates,
        "rules": [
            {
                "id": counts.rule.id,
                "question": counts.rule.ask("image"),
                "positive": list(counts.rule.positive),
                "choices": list(counts.rule.choices),
                "severity": counts.rule.severity,
                "threshold": counts.rule.threshold,
                "description": counts.rule.description,
                "asked": counts.asked,
                "fired": counts.fired,
                "bins": counts.bins.tolist(),
            }
            for counts in collected.rules
        ],
        "errors": [
            {"kind": kind, "count": count, "examples": collected.examples[kind]}
            for kind, count in collected.errors.most_common()
        ],
        "repeated": collected.repeated.most_common(_REPEATED),
        "gallery": [
            card(row, collected.rules, images.get(index), collected.repeated[row["source"]])
            for index, row in sorted(collected.cards.items())
        ],
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
