"""A small real service for tests of the supervisor: HTTP /readyz on --port, told how to behave by flags.

--fail A-B         exit on the starts from number A to B (counted in the file --starts), with the status of --status
--ignore-term      stay when asked to end
--spawn FILE       start a grandchild and write its process id to FILE
"""

from __future__ import annotations

import argparse
import http.server
import json
import signal
import subprocess
import sys
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--starts", type=Path)
    parser.add_argument("--ended", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--fail", default="0-0")
    parser.add_argument("--status", type=int, default=3)
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--spawn", type=Path)
    options = parser.parse_args()
    with options.starts.open("a") as file:
        file.write("start\n")
    first, last = map(int, options.fail.split("-"))
    if first <= len(options.starts.read_text().splitlines()) <= last:
        print(json.dumps({"event": "cannot start", "level": "error", "reason": "the moon is full"}), flush=True)
        print(f"{options.name}: error: the moon is full", flush=True)
        sys.exit(options.status)
    if options.spawn:
        options.spawn.write_text(str(subprocess.Popen(["sleep", "600"]).pid))

    def end(*_: object) -> None:
        if options.ignore_term:
            return
        with options.ended.open("a") as file:
            file.write(options.name + "\n")
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    print("a plain line", flush=True)
    http.server.HTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
