"""aiperf: a benchmark with images that it draws, streamed, and the server's metrics."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from scene import CHECKPOINT, MODEL, SERVER

REQUESTS, TOKENS = 6, 8
with tempfile.TemporaryDirectory() as folder:
    command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--model", MODEL, "--url", SERVER]
    command += ["--endpoint-type", "chat", "--streaming", "--tokenizer", CHECKPOINT, "--ui", "simple"]
    command += ["--image-width-mean", "112", "--image-height-mean", "84", "--image-batch-size", "1"]
    command += ["--isl", "20", "--osl", str(TOKENS), "--extra-inputs", "ignore_eos:true", "--use-server-token-count"]
    command += ["--request-count", str(REQUESTS), "--concurrency", "2", "--output-artifact-dir", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    reports = list(Path(folder).rglob("profile_export_aiperf.json"))
    if done.returncode or not reports:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    report = json.loads(reports[0].read_text())
    print({name: report[name]["avg"] for name in ("request_count", "output_sequence_length")})
    assert report["request_count"]["avg"] == REQUESTS and not report.get("error_summary")
    assert report["output_sequence_length"]["avg"] == TOKENS
    assert list(Path(folder).rglob("server_metrics_export.json"))
