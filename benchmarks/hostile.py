"""What hostile and large bodies do to a gateway: how long its event loop is held, and its memory.

A process of its own asks /healthz on one open connection, again and again; the longest answer bounds the longest stall.
What the machine does to that process alone is measured first, on a gateway with nothing to do. Target: 50 ms beyond it.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.gateway.processes import GatewayProcess
from tests.gateway.test_abuse import HOSTILE
from tests.images import photograph, save
from tests.processes import ServiceProcess

POLL = """
import select, socket, sys, time
host, port = sys.argv[1].split(":")
asking = socket.create_connection((host, int(port)))
asking.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
longest = 0.0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.004)[0]:
    began = time.perf_counter()
    asking.sendall(b"GET /healthz HTTP/1.1\\r\\nhost: localhost\\r\\n\\r\\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += asking.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200"), answer
    longest = max(longest, time.perf_counter() - began)
print(longest * 1000)
"""
TARGET_MS = 50.0
MIB = 1 << 20


def longest_ms(gateway: GatewayProcess, work: Callable[[], object]) -> float:
    """Milliseconds of the longest /healthz while `work` runs."""
    command = [sys.executable, "-c", POLL, gateway.url.removeprefix("http://")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as poll:
        assert poll.stdout is not None
        poll.stdout.readline()
        try:
            work()
        finally:
            found, _ = poll.communicate("\n")
    return float(found)


def resident_mib(gateway: GatewayProcess) -> int:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) // 1024 if found else 0


def at_once(number: int, work: Callable[[], object]) -> Callable[[], None]:
    def all_of_them() -> None:
        threads = [threading.Thread(target=work) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return all_of_them


def cases(gateway: GatewayProcess) -> dict[str, Callable[[], object]]:
    """What is done to the gateway, by name."""
    image = save(photograph("coffee", (320, 240)), "PNG") + bytes(18 * MIB)
    encoded = base64.b64encode(image).decode()
    as_json = json.dumps({"data": encoded}).encode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    as_chat = json.dumps({"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}).encode()
    headers = {"content-type": "application/json"}

    def post(path: str, body: bytes) -> Callable[[], object]:
        def send() -> object:
            with gateway.client() as client:
                answer = client.post(path, content=body, headers=headers)
                assert answer.status_code in (200, 400, 429), answer.text
                assert answer.status_code == 200 or body not in (as_json, as_chat), answer.text
                return answer

        return send

    def upload() -> httpx2.Response:
        with gateway.client() as client:
            return client.post("/v1/images", files={"file": image}).raise_for_status()

    chat = "/v1/chat/completions"
    found: dict[str, Callable[[], object]] = {f"body: {name}": post(chat, body) for name, (body, _) in HOSTILE.items()}
    found["12 long texts at once"] = at_once(12, post(chat, HOSTILE["text"][0]))
    found["image of 18 MiB, form"] = upload
    found["image of 18 MiB, JSON"] = post("/v1/images", as_json)
    found["image of 18 MiB, chat"] = post(chat, as_chat)
    found["six such chats at once"] = at_once(6, post(chat, as_chat))
    return found


def main() -> int:
    """Print a line a case; status 1 when a stall is over the target or memory over 1 GiB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_checkpoint(Path(directory) / "model", size="tiny", max_pixels=100 * 28 * 28)
        common = ("--model", str(model), "--store", f"file://{directory}/store")
        with (
            ServiceProcess("vision_service", *common) as vision,
            ServiceProcess("lm_service", *common, "--vision", vision.address) as language,
            GatewayProcess("--vision", vision.address, "--lm", language.address) as gateway,
        ):
            results = measure(gateway)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    idle = results["nothing"]["ms"]
    return int(any(case["ms"] - idle > TARGET_MS or case["mib"] > 1024 for case in results.values()))


def measure(gateway: GatewayProcess) -> dict[str, dict[str, float]]:
    """Longest /healthz (ms) and resident MiB afterwards, by case."""
    results: dict[str, dict[str, float]] = {}
    for name, work in {"nothing": lambda: threading.Event().wait(3), **cases(gateway)}.items():
        results[name] = {"ms": round(longest_ms(gateway, work), 1), "mib": resident_mib(gateway)}
        print(f"{name:28} {results[name]['ms']:7.1f} ms {results[name]['mib']:5} MiB", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
