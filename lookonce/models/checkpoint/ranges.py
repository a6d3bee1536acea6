"""One half out of shards that hold both, by byte ranges: what a hub is asked for is that half's tensors, and no others.

A part of a shard is a safetensors file of its own: a header that names the half's tensors, in the order in which they
lie in the shard, then their data. It grows from its beginning, so a download that broke off goes on at its length.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lookonce.models.checkpoint.files import located
from lookonce.models.checkpoint.headers import MAX_HEADER_BYTES, TensorEntry, read_header
from lookonce.models.registry import Family, Half

WORTH_BYTES = 1 << 20
"""A shard is fetched whole if it has no more bytes than that which aren't wanted."""
_FIRST_BYTES = 1 << 17  # of a shard: nearly always all of its header


@dataclass(frozen=True)
class Part:
    """The tensors of one half in a shard."""

    entries: tuple[TensorEntry, ...]  # in the shard's order
    others: int  # bytes of all other tensors
    shard: str  # what tells the shard's contents from others'

    @property
    def worth(self) -> bool:
        """Whether it is much less than the shard."""
        return self.others > WORTH_BYTES

    @property
    def header(self) -> bytes:
        """How its file begins."""
        tensors: dict[str, object] = {"__metadata__": {"shard": self.shard}}
        offset = 0
        for entry in self.entries:
            ends = [offset, offset + entry.nbytes]
            tensors[entry.stored_name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": ends}
            offset += entry.nbytes
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def ranges(self, done: int) -> Iterator[tuple[int, int]]:
        """Where the data lies in the shard that follows the first `done` bytes of it: begins and ends of runs."""
        begin = end = 0
        for entry in self.entries:
            skipped, done = min(done, entry.nbytes), max(done - entry.nbytes, 0)
            first, last = entry.offset + skipped, entry.offset + entry.nbytes
            if first == last:
                continue
            if first != end:
                if end > begin:
                    yield begin, end
                begin = first
            end = last
        if end > begin:
            yield begin, end


def part_of(url: str, size: int, shard: str, family: Family, half: Half, scratch: Path) -> Part | None:
    """What a shard at `url` holds of a half; None where ranges aren't served. `scratch` is a file to write and remove.

    Raises CheckpointError for what is no safetensors file, and what the hub library raises."""
    first = _read(url, 0, min(size, _FIRST_BYTES))
    if first is None:
        return None
    length = 8 + min(int.from_bytes(first[:8], "little"), MAX_HEADER_BYTES)
    rest = _read(url, len(first), min(length, size)) if length > len(first) else b""
    if rest is None:
        return None
    try:
        with open(scratch, "wb") as stream:  # sparse: the size that the header's claims are held against
            stream.write(first + rest)
            stream.truncate(size)
        entries, _ = read_header(scratch)
    finally:
        scratch.unlink(missing_ok=True)
    places = located(family, entries)
    wanted = [entry for name, entry in entries.items() if name in places and places[name][0] is half]
    others = sum(entry.nbytes for entry in entries.values()) - sum(entry.nbytes for entry in wanted)
    return Part(tuple(sorted(wanted, key=lambda entry: entry.offset)), others, shard)


def fetch_part(url: str, part: Part, file: Path) -> None:
    """Bring a part's file, or what it lacks yet. Raises what the hub library raises."""
    from huggingface_hub.file_download import http_get

    partial, header = file.with_name(f"{file.name}.incomplete"), part.header
    with open(partial, "a+b") as stream:
        stream.seek(0)
        if stream.read(len(header)) != header:  # nothing yet, or another shard's
            stream.truncate(0)
            stream.write(header)
        done = stream.seek(0, os.SEEK_END) - len(header)
        for begin, end in part.ranges(done):
            headers = _headers() | {"Range": f"bytes={begin}-{end - 1}"}
            http_get(url, stream, headers=headers, expected_size=end - begin, displayed_filename=file.name)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def _read(url: str, begin: int, end: int) -> bytes | None:
    """Bytes `begin` to `end` of a file; None if the server sends something else than that range."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]  # likewise

    headers = _headers() | {"Range": f"bytes={begin}-{end - 1}"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as reply:
        hf_raise_for_status(reply)
        if reply.status_code != 206:
            return None
        data = reply.read()
    return data if len(data) == end - begin else None


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported at run time

    return build_hf_headers() | {"accept-encoding": "identity"}  # ranges are of the file itself
