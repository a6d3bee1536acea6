"""What an operator sees of a running system: one trace through every hop with its log lines, dashboards that hold data,
rules that evaluate, names that promtool accepts."""

from __future__ import annotations

import itertools
import json
import secrets
import shutil
import subprocess
import time

import httpx2
import pytest
import yaml

from deploy.check import metrics
from lookonce.core.errors import LookonceError
from lookonce.core.telemetry import tracing
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.cli.commands import invoke
from tests.images import photograph, save
from tests.ports import free_port
from tests.processes import ROOT
from tests.system.cluster import System, data_url, image_part, text_part
from tests.system.collector import Collector
from tests.valkey import ValkeyServer

pytestmark = pytest.mark.slow
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs Debian's prometheus (apt-get install it)",
)
ENGINE = ("queue", "embedding", "prefill", "decode")
ENCODER = ("wait", "prepare", "batch", "forward")
GATEWAY, VISION, LANGUAGE = "lookonce-gateway", "lookonce-vision", "lookonce-language"


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """A system on Valkey, its spans going to a collector, its metrics open: (system, collector, metric ports)."""
    folder = tmp_path_factory.mktemp("observed")
    model = make_random_checkpoint(folder / "model", max_pixels=100 * 28 * 28)
    ports = {name: free_port() for name in ("gateway", "vision", "language")}

    def options(name):
        return ("--metrics-listen", f"127.0.0.1:{ports[name]}", "--trace-endpoint", collector.endpoint)

    with (
        Collector() as collector,
        ValkeyServer() as valkey,
        System(
            model,
            folder,
            store=valkey.url,
            vision_args=(*options("vision"), "--log-level", "debug"),
            language_args=(*options("language"), "--log-level", "debug"),
            gateway_args=options("gateway"),
        ) as system,
    ):
        yield system, collector, ports


def ask(system, data, trace_id):
    messages = [{"role": "user", "content": [image_part(data_url(data)), text_part("What is it?")]}]
    body = {"model": system.model, "messages": messages, "max_tokens": 4, "temperature": 0}
    header = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    reply = system.http.post("/v1/chat/completions", json=body, headers=header)
    assert reply.status_code == 200, reply.text
    return reply


def lines_of(log, trace_id, seconds=30.0):
    """JSON log lines of a trace; a line may be written after the answer."""
    deadline = time.monotonic() + seconds
    while True:
        parsed = [json.loads(line) for line in log().splitlines() if line.startswith("{") and line.endswith("}")]
        found = [line for line in parsed if line.get("trace_id") == trace_id]
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_one_request_is_one_trace_through_every_hop_and_its_logs(observed):
    system, collector, _ = observed
    trace_id = secrets.token_hex(16)
    reply = ask(system, save(photograph("coffee", (150, 100)), "PNG"), trace_id)
    assert reply.headers["traceparent"].split("-")[1] == trace_id
    hops = {
        (GATEWAY, "POST /v1/chat/completions"),
        (GATEWAY, "vision service: Encode"),
        (VISION, "lookonce.v1.VisionEncoder/Encode"),
        (VISION, "store.get"),
        (VISION, "store.put"),
        (GATEWAY, "store.put"),
        (GATEWAY, "language service: Generate"),
        (LANGUAGE, "lookonce.v1.LanguageModel/Generate"),
        (LANGUAGE, "store.get"),
        *((LANGUAGE, f"engine.{phase}") for phase in ENGINE),
        *((VISION, f"encode.{phase}") for phase in ENCODER),
    }
    spans = collector.wait_for(trace_id, hops)
    by_id = {span.span_id: span for span in spans}
    assert all(span.end >= span.start for span in spans)
    for span in spans:
        parent = by_id.get(span.parent)
        if parent is None:
            assert (span.service, span.name) == (GATEWAY, "POST /v1/chat/completions")
        elif parent.service == span.service:
            assert parent.start <= span.start, (parent, span)
    under = {(span.service, span.name): by_id[span.parent].name for span in spans if span.parent in by_id}
    assert under[VISION, "lookonce.v1.VisionEncoder/Encode"] == "vision service: Encode"
    assert under[LANGUAGE, "lookonce.v1.LanguageModel/Generate"] == "language service: Generate"
    assert under[LANGUAGE, "store.get"] == "lookonce.v1.LanguageModel/Generate"
    phases(spans)
    facts = {span.name: span.attributes for span in spans}
    assert facts["lookonce.v1.VisionEncoder/Encode"]["lookonce.encode_ms"] > 0
    assert facts["lookonce.v1.LanguageModel/Generate"]["lookonce.prefill_tokens"] > 0
    assert facts["POST /v1/chat/completions"]["lookonce.status"] == 200
    for process in (system.gateways[0], system.visions[0], system.languages[0]):
        assert lines_of(lambda process=process: process.log, trace_id), process


def phases(spans):
    """What happens within a service follows one upon the other, and lies within the call it belongs to."""
    named = {span.name: span for span in spans}
    for service, call, prefix, names in (
        (LANGUAGE, "lookonce.v1.LanguageModel/Generate", "engine", ENGINE),
        (VISION, "lookonce.v1.VisionEncoder/Encode", "encode", ENCODER),
    ):
        parts = [named[f"{prefix}.{name}"] for name in names]
        assert {part.parent for part in parts} == {named[call].span_id}
        assert {part.service for part in parts} == {service}
        assert parts[0].start >= named[call].start and parts[-1].end <= named[call].end
        for earlier, later in itertools.pairwise(parts):
            assert abs(later.start - earlier.end) < 2000, (earlier, later)  # nanoseconds, of rounding
    assert named["engine.decode"].attributes["lookonce.tokens"] == 4
    assert named["engine.embedding"].attributes["lookonce.source"] in ("store", "fetched")
    assert named["engine.prefill"].attributes["lookonce.prefill_tokens"] > 0


def test_scores_and_warm_questions_have_phases_too(observed):
    """A warm question loads nothing, so no such phase is shown; a score is one phase after the wait."""
    system, collector, _ = observed
    image = system.upload(save(photograph("coffee", (140, 100)), "PNG"))["id"]
    system.ask(image, ["What is it?"], max_tokens=2)
    trace_id = secrets.token_hex(16)
    body = {"questions": ["What else?", {"text": "Is it?", "choices": ["yes", "no"]}], "max_tokens": 3}
    header = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    assert system.http.post(f"/v1/images/{image}/questions", json=body, headers=header).status_code == 200
    wanted = {(LANGUAGE, f"engine.{phase}") for phase in ("queue", "prefill", "decode", "score")}
    spans = collector.wait_for(trace_id, wanted | {(LANGUAGE, "lookonce.v1.LanguageModel/Score")})
    names = [span.name for span in spans]
    assert "engine.embedding" not in names and names.count("engine.queue") == 2
    by_id = {span.span_id: span for span in spans}
    under = {span.name: by_id[span.parent].name for span in spans if span.name.startswith("engine.")}
    assert under["engine.score"] == "lookonce.v1.LanguageModel/Score"
    assert under["engine.decode"] == "lookonce.v1.LanguageModel/Generate"


def test_a_failed_request_says_so_in_its_trace(observed):
    system, collector, _ = observed
    trace_id = secrets.token_hex(16)
    header = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    reply = system.http.post("/v1/images", files={"file": b"these bytes"}, headers=header)
    assert reply.status_code == 400
    spans = collector.wait_for(trace_id, {(VISION, "lookonce.v1.VisionEncoder/Encode"), (GATEWAY, "POST /v1/images")})
    encode = next(span for span in spans if span.name == "lookonce.v1.VisionEncoder/Encode")
    assert encode.failed and encode.attributes["error.type"] == "image_invalid"
    assert "these bytes" not in str(spans)


@pytest.mark.parametrize("endpoint", ["otel:4317", "ftp://otel:4317", "http://"])
def test_an_endpoint_that_is_none_is_refused(endpoint):
    with pytest.raises(LookonceError, match="trace_endpoint must be"):
        tracing.export_spans("test", endpoint)
    assert not tracing.is_exporting()


class Prometheus:
    """Debian's own server over the rules and a configuration of three targets."""

    def __init__(self, folder, ports):
        self.port = free_port()
        targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"service": name}} for name, port in ports.items()]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ROOT / metrics.RULES)],
            "scrape_configs": [{"job_name": "lookonce", "static_configs": targets}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = (folder / "log").open("wb")
        command = [
            shutil.which("prometheus"),
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
        ]
        command.append(f"--web.listen-address=127.0.0.1:{self.port}")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    @property
    def ready(self):
        """It listens before it can answer."""
        try:
            return httpx2.get(f"http://127.0.0.1:{self.port}/-/ready", trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False

    def api(self, path, **parameters):
        reply = httpx2.get(
            f"http://127.0.0.1:{self.port}/api/v1/{path}", params=parameters, trust_env=False, timeout=30
        )
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    def close(self):
        self.process.kill()
        self.process.wait()
        self.log.close()


@needs_prometheus
def test_every_dashboard_query_returns_data_and_every_rule_evaluates(observed, tmp_path):
    system, _, ports = observed
    prometheus = Prometheus(tmp_path, ports)
    boards = [json.loads(file.read_text()) for file in sorted((ROOT / metrics.DASHBOARDS).glob("*.json"))]
    wanted = [(board["title"], *query) for board in boards for query in metrics.queries(board)]
    assert len(wanted) > 30
    try:
        deadline, turn, missing = time.monotonic() + 150, 0, wanted
        while missing:
            assert time.monotonic() < deadline, missing
            size = (150 + 3 * turn, 100)
            ask(system, save(photograph("chelsea", size), "PNG"), secrets.token_hex(16))
            ask(system, save(photograph("chelsea", (150, 100)), "PNG"), secrets.token_hex(16))
            turn += 1
            if prometheus.ready:
                missing = [item for item in missing if not prometheus.api("query", query=item[2])["result"]]
        rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
        assert len(rules) == 11
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, rules
        assert not [rule["name"] for rule in rules if rule["state"] == "firing"]
    finally:
        prometheus.close()


@needs_prometheus
def test_promtool_accepts_rules_and_names(observed):
    _, _, ports = observed
    done = subprocess.run(["promtool", "check", "rules", str(ROOT / metrics.RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, port in ports.items():
        text = httpx2.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        ours = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("lookonce_")]
        assert ours == [], (name, ours)


def test_top_over_all_three(observed):
    system, _, ports = observed
    also = [argument for port in ports.values() for argument in ("--also", f"http://127.0.0.1:{port}")]
    shown = invoke("top", "--once", "--url", system.gateways[0].url, *also[2:])
    assert shown.returncode == 0, shown.stderr
    assert "images under way" in shown.stdout and "no measurements" not in shown.stdout
    assert "embeddings" in shown.stdout and "ready" in shown.stdout
