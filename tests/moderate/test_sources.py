"""Sources: what the user types becomes the same list of images every time; each entry is read, or says why not."""

from __future__ import annotations

import base64
import io
import json
import sys
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.http_fetch.fetch_policy import FetchPolicy
from lookonce.moderation.batch.sources.items import Unusable, items
from lookonce.moderation.batch.sources.opening import SourceOptions, open_source
from lookonce.moderation.batch.sources.reader import Reader

FILES = {"a/1.png": b"one", "a/2.JPG": b"two", "b.webp": b"three", "a/z/3.gif": b"four"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in {**FILES, "notes.txt": b"no image", ".hidden/4.png": b"hidden", "a/.5.png": b"hidden"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


async def read(source: str | Path, max_bytes: int = 1000, **options) -> dict[str, bytes | ErrorKind]:
    """Name and bytes (or kind of error) of every entry."""
    opened = open_source(str(source), SourceOptions(max_bytes=max_bytes, **options))
    reader = Reader(threads=2, max_bytes=max_bytes, policy=FetchPolicy(mode="off"))
    found: dict[str, bytes | ErrorKind] = {}
    listed = list(items(opened))
    count = opened.extent().count
    assert count is None or count == len(listed)
    for item in listed:
        try:
            found[item.name] = (await reader.read(item))[0]
        except LookonceError as error:
            found[item.name] = error.kind
    reader.close()
    return found


async def test_a_folder_is_its_images_in_order(folder):
    found = await read(folder)
    assert [Path(name).relative_to(folder).as_posix() for name in found] == [
        "a/1.png",
        "a/2.JPG",
        "a/z/3.gif",
        "b.webp",
    ]
    assert list(found.values()) == [b"one", b"two", b"four", b"three"]


async def test_a_glob_takes_what_it_matches(folder):
    assert list((await read(f"{folder}/**/*.png")).values()) == [b"one"]
    assert list((await read(f"{folder}/*.txt")).values()) == [b"no image"]
    assert list((await read(folder / "b.webp")).values()) == [b"three"]


async def test_a_list_of_paths(folder):
    (folder / "list.txt").write_text(f"# comment\na/1.png\n\n{folder}/b.webp\nmissing.png\nhttps://example.com/x.png\n")
    found = await read(folder / "list.txt")
    assert list(found.values()) == [b"one", b"three", ErrorKind.NOT_FOUND, ErrorKind.INVALID_ARGUMENT]
    elsewhere = await read(folder / "list.txt", root=str(folder / "z"))
    assert list(elsewhere.values())[:2] == [ErrorKind.NOT_FOUND, b"three"]


async def test_json_lines(folder):
    rows = [
        {"id": "x", "image": "a/1.png"},
        {"id": "y", "image": "data:image/png;base64," + base64.b64encode(b"inline").decode()},
        {"id": "z", "image": None},
    ]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n")
    found = await read(folder / "t.jsonl", id_column="id")
    assert found == {
        "x": b"one", "y": b"inline", "z": ErrorKind.INVALID_ARGUMENT,
        f"{folder}/t.jsonl#3": ErrorKind.INVALID_ARGUMENT,
    }  # fmt: skip


async def test_csv_with_another_separator_and_column(folder):
    (folder / "t.csv").write_text("name;photo\nfirst;a/1.png\nsecond;b.webp\n")
    found = await read(folder / "t.csv", column="photo", id_column="name")
    assert found == {"first": b"one", "second": b"three"}
    with pytest.raises(LookonceError, match="it has name, photo"):
        open_source(str(folder / "t.csv")).extent()


async def test_parquet_with_paths_bytes_and_structs(folder):
    pq.write_table(pa.table({"path": ["a/1.png", "b.webp"]}), folder / "paths.parquet")
    pq.write_table(pa.table({"image": [b"raw", None]}), folder / "bytes.parquet")
    structs = [{"bytes": b"held", "path": "x.png"}, {"bytes": None, "path": "a/1.png"}]
    pq.write_table(pa.table({"image": structs}), folder / "hub.parquet")
    assert list((await read(folder / "paths.parquet")).values()) == [b"one", b"three"]
    assert list((await read(folder / "bytes.parquet")).values()) == [b"raw", ErrorKind.INVALID_ARGUMENT]
    assert list((await read(folder / "hub.parquet")).values()) == [b"held", b"one"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
async def test_tars_and_folders_of_them(tmp_path, suffix):
    for shard in range(2):
        with tarfile.open(tmp_path / f"s{shard}{suffix}", "w:gz" if suffix == ".tar.gz" else "w") as archive:
            for name, data in {"1.jpg": b"image", "1.json": b"{}", "2.png": b"x" * 2000}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    for source in (tmp_path, f"{tmp_path}/s*{suffix}"):
        found = await read(source)
        assert list(found) == [f"{tmp_path}/s{n}{suffix}#{name}" for n in (0, 1) for name in ("1.jpg", "2.png")]
        assert list(found.values()) == [b"image", ErrorKind.PAYLOAD_TOO_LARGE] * 2


async def test_file_systems_of_fsspec():
    memory = fsspec.filesystem("memory")
    for name, data in FILES.items():
        memory.pipe(f"/bucket/{name}", data)
    assert list((await read("memory://bucket/")).values()) == [b"one", b"two", b"four", b"three"]
    assert list((await read("memory://bucket/a/*.png")).values()) == [b"one"]
    memory.pipe("/bucket/z/list.txt", b"../a/1.png\n../b.webp\ngone.png\n")
    assert list((await read("memory://bucket/z/list.txt")).values()) == [b"one", b"three", ErrorKind.NOT_FOUND]


def test_the_extent_changes_with_the_source(folder):
    before = open_source(str(folder)).extent()
    assert open_source(str(folder)).extent() == before
    (folder / "new.png").write_bytes(b"five")
    after = open_source(str(folder)).extent()
    assert after.count == 5 and before.count == 4 and after.digest != before.digest


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nothing", "no such file or directory"),
        ("empty", "holds no images"),
        ("*.jpg", "matches no file"),
        ("b.bin", "a source is a directory, a glob, or a file that ends in"),
        ("bad.parquet", "is not a Parquet file"),
        ("bad.tar", "is no tar file"),
        ("https://example.com/a.png", "write URLs into a text file"),
        ("ftp://example.com/", "sources are paths"),
        ("s3://bucket/x/", "lookonce[s3]"),
        ("gs://bucket/x/", "lookonce[gcs]"),
    ],
)
def test_what_is_no_source_says_so(tmp_path, monkeypatch, source, text):
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    (tmp_path / "empty").mkdir()
    for name in ("b.bin", "bad.parquet", "bad.tar"):
        (tmp_path / name).write_bytes(b"neither")
    with pytest.raises(LookonceError) as caught:
        open_source(source if "://" in source else f"{tmp_path}/{source}").extent()
    assert text in caught.value.message


def test_entries_without_an_image_are_entries(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"path": "a.png"}\n{"other": 1}\n')
    (_, first), (_, second) = open_source(str(tmp_path / "t.jsonl")).entries()
    assert not isinstance(first, Unusable) and isinstance(second, Unusable)
