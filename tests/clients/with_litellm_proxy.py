"""LiteLLM's proxy in front: its health check, then OpenAI's client through it."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
from scene import BASE_URL, IMAGES, KEY, MODEL, check, content

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
MASTER = "sk-" + secrets.token_hex(32)
config = f"""
model_list:
- model_name: looker
  litellm_params: {{model: hosted_vllm/{MODEL}, api_base: {BASE_URL}, api_key: {KEY}}}
"""
URL = f"http://127.0.0.1:{port}"


def ready() -> bool:
    try:
        return urllib.request.urlopen(f"{URL}/health/liveliness", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


with tempfile.TemporaryDirectory() as folder:
    Path(folder, "config.yaml").write_text(config)
    command = [str(Path(sys.executable).with_name("litellm")), "--config", f"{folder}/config.yaml", "--port", str(port)]
    log = Path(folder, "log")
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": MASTER}
    with log.open("wb") as output:
        proxy = subprocess.Popen([*command, "--host", "127.0.0.1"], env=env, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not ready():
            if time.monotonic() > deadline or proxy.poll() is not None:
                raise SystemExit(log.read_text()[-2000:])
            time.sleep(0.5)
        health = openai.OpenAI(base_url=URL, api_key=MASTER).get("/health", cast_to=object)
        print("healthy:", health["healthy_count"])
        assert health["healthy_count"] == 1, health
        client = openai.OpenAI(base_url=f"{URL}/v1", api_key=MASTER)
        for form in IMAGES:
            messages = [{"role": "user", "content": content(form)}]
            check(form, client.chat.completions.create(model="looker", messages=messages).choices[0].message.content)
            stream = client.chat.completions.create(model="looker", messages=messages, stream=True)
            check(f"{form}, streamed", "".join(c.choices[0].delta.content or "" for c in stream if c.choices))
    finally:
        proxy.terminate()
        proxy.wait()
