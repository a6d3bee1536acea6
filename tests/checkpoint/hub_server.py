"""A stand-in for the hub's HTTP API over one local directory, recording what was asked of it.

It speaks what huggingface_hub uses to download a model: model info, tree listing, HEAD and GET (with ranges) of
resolve.
"""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from blake3 import blake3


class Hub:
    """Serves `directory` as repository `acme/model` at one commit; `gated` refuses its files as the hub does.

    `stalls` and `cuts`: byte of a file (by name) behind which nothing more is sent, or the connection ends.
    `sent` counts the bytes of each file's contents. Without `ranges` files are sent whole.
    """

    def __init__(self, directory: Path):
        self.directory, self.commit, self.gated, self.requests = directory, "c0ffee" + "0" * 34, False, []
        self.stalls, self.cuts, self.tags, self.sent, self.closing = {}, {}, {}, Counter(), threading.Event()
        self.stalled, self.ranges = threading.Event(), True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fetched(self) -> set[str]:
        """Names of the files whose contents were asked for."""
        return {path.rsplit("/", 1)[1] for method, path in self.requests if method == "GET" and "/resolve/" in path}

    def revisions(self) -> set[str]:
        """Revisions that files were asked for at."""
        return {path.split("/resolve/")[1].split("/")[0] for _, path in self.requests if "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def log_message(self, *args):
        pass

    def answer(self, body):
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append((self.command, path))
        if api := re.fullmatch(r"/api/models/acme/model(?:/(revision|tree)/([^/]+))?", path):
            if api[2] not in (None, "main", hub.commit):
                return self.refuse(404, "RevisionNotFound")
            names = sorted(file.name for file in hub.directory.iterdir())
            if api[1] == "tree":
                return self.send(json.dumps([self.entry(name) for name in names]).encode(), "application/json", body)
            info = {"id": "acme/model", "sha": hub.commit, "siblings": [{"rfilename": name} for name in names]}
            return self.send(json.dumps(info).encode(), "application/json", body)
        if resolve := re.fullmatch(r"/acme/model/resolve/([^/]+)/([^/]+)", path):
            if hub.gated:
                return self.refuse(403, "GatedRepo")
            if not (hub.directory / resolve[2]).is_file():
                return self.refuse(404, "EntryNotFound")
            data = (hub.directory / resolve[2]).read_bytes()
            return self.send(data, "application/octet-stream", body, name=resolve[2])
        return self.refuse(404, "RepoNotFound")

    def entry(self, name):
        data = (self.hub.directory / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": blake3(data).hexdigest()[:40]}

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, data, kind, body, name=None):
        whole, status, start = len(data), 200, 0
        tag = self.hub.tags.get(name) or blake3(data).hexdigest()[:40]
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "") if self.hub.ranges else ""):
            start, status = int(ranged[1]), 206
            data = data[start : int(ranged[2]) + 1 if ranged[2] else whole]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{whole}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.end_headers()
        if body:
            self.write(data, start, name)

    def write(self, data, start, name):
        hub = self.hub
        limit = min(hub.stalls.get(name, len(data) + start), hub.cuts.get(name, len(data) + start))
        part = data[: max(limit - start, 0)]
        self.wfile.write(part)
        if name is not None:
            hub.sent[name] += len(part)
        if len(part) < len(data):
            self.close_connection = True
            if name in hub.stalls:
                hub.stalled.set()
                hub.closing.wait()
