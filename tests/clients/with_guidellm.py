"""GuideLLM: its probes, then a benchmark with images that it draws."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from scene import CHECKPOINT, SERVER

REQUESTS, TOKENS = 4, 8
with tempfile.TemporaryDirectory() as folder:
    report = Path(folder, "report.json")
    command = [sys.executable, "-m", "guidellm", "run", "--disable-console-interactive"]
    command += ["--backend", f"kind=openai_http,target={SERVER}", "--profile", "kind=synchronous"]
    command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
    command += ["--data", f"kind=synthetic_image,width=112,height=84,output_tokens={TOKENS}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={CHECKPOINT}", "--output", f"kind=json,path={report}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if done.returncode or not report.is_file():
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    print(metrics["request_totals"])
    assert metrics["request_totals"]["successful"] == REQUESTS == metrics["request_totals"]["total"]
    assert metrics["output_token_count"]["successful"]["mean"] == TOKENS
