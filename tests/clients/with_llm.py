"""Simon Willison's `llm`: the command, with a model of its own file."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scene import BASE_URL, FILE, MODEL, QUESTION, check

with tempfile.TemporaryDirectory() as folder:
    models = Path(folder, "extra-openai-models.yaml")
    models.write_text(
        f"- model_id: mine\n  model_name: {MODEL}\n  api_base: {BASE_URL}\n  vision: true\n  supports_schema: true\n"
    )
    Path(folder, "star.png").write_bytes(FILE)
    command = [sys.executable, "-m", "llm", "-m", "mine", "-a", f"{folder}/star.png", QUESTION]
    for options in ([], ["--no-stream"]):
        env = {**os.environ, "LLM_USER_PATH": folder}
        done = subprocess.run([*command, *options], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        check(" ".join(["llm", *options]), done.stdout or done.stderr)
    schema = [*command, "--schema", "kind str, sides int"]
    done = subprocess.run(schema, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = json.loads(done.stdout or done.stderr)
    print(f"llm --schema: {found['kind']!r}, {found['sides']}")
