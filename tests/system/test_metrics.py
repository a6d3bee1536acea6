"""What running processes tell Prometheus: every name is in docs/metrics.md, and real requests move the counters."""

from __future__ import annotations

import re
import time

import httpx2
import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.images import photograph, save
from tests.ports import free_port
from tests.processes import ROOT
from tests.system.cluster import System

QUESTIONS = 6


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """Each process's metrics as text, after an image and a few questions."""
    folder = tmp_path_factory.mktemp("metrics")
    model = make_random_checkpoint(folder / "model")
    vision, language = (f"127.0.0.1:{free_port()}" for _ in range(2))
    listening = {"vision_args": ("--metrics-listen", vision), "language_args": ("--metrics-listen", language)}
    with System(model, folder, **listening) as system:
        image = system.upload(save(photograph("coffee", (90, 120)), "PNG"))["id"]
        for _ in range(2):
            questions = [{"text": f"Question {i}?", "max_tokens": 5} for i in range(QUESTIONS)]
            system.ask(image, questions, temperature=0)
        system.ask(image, [{"text": "Is it?", "choices": ["yes", "no"]}])
        urls = {
            "vision": f"http://{vision}/metrics",
            "language": f"http://{language}/metrics",
            "gateway": f"{system.gateways[0].url}/metrics",
        }
        deadline = time.monotonic() + 30
        while True:  # the engine counts a step after its last tokens are out
            found = {name: httpx2.get(url).text for name, url in urls.items()}
            if values(found["language"])["lookonce_lm_running"] == 0 or time.monotonic() > deadline:
                return found
            time.sleep(0.05)


def values(text):
    """Samples without labels, and sums over labels."""
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^(lookonce_\w+)(?:\{.*\})? ([-+.\w]+)$", text, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def exposed(text):
    """Names of our metrics as Prometheus knows them."""
    named = re.findall(r"^# TYPE (lookonce_\w+) ", text, re.MULTILINE)
    return {name for name in named if not name.endswith("_created")}


def documented():
    """Names in docs/metrics.md by section."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    return {
        section.split("\n", 1)[0]: set(re.findall(r"^\| `(lookonce_\w+)`", section, re.MULTILINE))
        for section in sections
    }


def test_the_page_names_what_processes_expose(scraped):
    sections = documented()
    everywhere = sections.pop("Stores (in every process)")
    for process, names in (("vision", "Vision service"), ("language", "Language service"), ("gateway", "Gateway")):
        assert exposed(scraped[process]) == sections.pop(names) | everywhere, process
    assert not sections


def test_the_engine_counts_what_it_does(scraped):
    seen = values(scraped["language"])
    answers = 2 * QUESTIONS
    assert seen["lookonce_lm_completion_tokens_total"] == seen["lookonce_lm_inter_token_seconds_count"] + answers
    assert seen["lookonce_lm_ttft_seconds_count"] == answers
    # an answer's first token comes of its prompt, and its last is never fed
    assert seen["lookonce_lm_decode_tokens_total"] == seen["lookonce_lm_inter_token_seconds_count"]
    assert seen["lookonce_lm_prefix_misses_total"] == 1
    assert seen["lookonce_lm_prefix_hits_total"] == answers
    assert 0 < seen["lookonce_lm_prefix_bytes"] <= seen["lookonce_lm_prefix_budget_bytes"]
    assert seen["lookonce_lm_steps_total"] == seen["lookonce_lm_step_seconds_count"] > 5
    assert seen["lookonce_lm_forward_seconds_total"] <= seen["lookonce_lm_step_seconds_sum"]
    assert (
        seen["lookonce_lm_prefill_tokens_total"] + seen["lookonce_lm_cached_tokens_total"]
        >= (seen["lookonce_lm_prompt_tokens_total"])
    )
    idle = ("running", "waiting", "kv_slots", "preemptions_total", "refusals_total")
    assert [seen[f"lookonce_lm_{name}"] for name in idle] == [0] * len(idle)
