"""s3:// and gs:// sources, with the libraries' own settings, against servers on this machine. The rows must be those
of the same files on disk."""

from __future__ import annotations

import importlib.util
import io
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.commands import Background, lookonce
from tests.moderate.buckets import BUCKET, S3, Gcs

PAGE = 1000  # keys that S3 lists at once
MANY = PAGE + 20
NEEDED = ("moto", "s3fs", "gcp_storage_emulator", "gcsfs")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs `pip install 'lookonce[slow]'`"
    ),
]


@pytest.fixture(scope="module")
def files(images):
    """Bytes of ten images, broken ones among them, by name."""
    chosen = sorted(images.truth, key=lambda name: (images.truth[name] is not None, name))[:10]
    return {name.replace("/", "-"): (images.folder / name).read_bytes() for name in sorted(chosen)}


@pytest.fixture(scope="module")
def known(pair, files, policy, tmp_path_factory):
    """Score, size and error of each of `files`, read from disk."""
    folder = tmp_path_factory.mktemp("files")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    done = pair.moderate(folder, policy, folder / "out.parquet")
    assert done.returncode == 0, done.stderr
    return {row["source"].rpartition("/")[2]: said_of(row) for row in pq.read_table(folder / "out.parquet").to_pylist()}


@pytest.fixture(scope="module", params=[S3, Gcs], ids=["s3", "gs"])
def server(request, files):
    """With the `files` again and again below many/, two tars, two tables. The emulator of gs:// lists all at once, S3's
    a page at a time."""
    with request.param() as running:
        names = list(files)
        for number in range(MANY):
            name = names[number % len(names)]
            running.put(f"many/{number // (MANY - 10)}/{number:05}-{name}", files[name])
        for shard in range(2):
            running.put(f"shards/{shard}.tar", tar_of({name: files[name] for name in names[shard::2]}))
        running.put("tables/bytes.parquet", parquet_of({"id": names, "image": list(files.values())}))
        paths = ["../many/0/00000-" + names[0], "nothing.png", f"{running.scheme}://{BUCKET}-2/nothing.png"]
        running.put("tables/paths.parquet", parquet_of({"path": paths}))
        yield running


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(columns: dict[str, list]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def said_of(row: dict) -> tuple:
    return row["image_digest"], row["width"], row["score_star"], row["follow_up_cross"], row["error"]


@pytest.fixture
def moderate(pair, policy, tmp_path):
    """Runs the command on a source of a server; how it ended, and its rows."""

    def run(source: str, server, *options: str, without: tuple[str, ...] = (), **env: str):
        out = tmp_path / "out.parquet"
        env = {name: value for name, value in (server.env | env).items() if name not in without}
        command = ["moderate", source, "--policy", policy, "--out", out, *pair.arguments(), *options]
        done = lookonce(*command, **env)
        return done, pq.read_table(out).to_pylist() if out.exists() else []

    return run


def test_a_prefix_of_more_keys_than_one_page(moderate, server, known):
    done, rows = moderate(server.at("many/"), server)
    assert done.returncode == 0, done.stderr
    names = list(known)
    assert [row["source"] for row in rows] == [
        server.at(f"many/{number // (MANY - 10)}/{number:05}-{names[number % len(names)]}") for number in range(MANY)
    ]
    assert {(row["source"][-11:], said_of(row)) for row in rows} == set(known.items())
    assert {row[-1] for row in known.values()} == {None, "image_invalid"}  # neither all read nor all broken


def test_tars_that_a_glob_matches(moderate, server, known):
    done, rows = moderate(server.at("shards/*.tar"), server)
    assert done.returncode == 0, done.stderr
    names = list(known)
    assert [row["source"] for row in rows] == [
        server.at(f"shards/{shard}.tar#{name}") for shard in (0, 1) for name in names[shard::2]
    ]
    assert [said_of(row) for row in rows] == [known[name] for shard in (0, 1) for name in names[shard::2]]


def test_tables_with_bytes_and_with_paths_some_of_which_lead_nowhere(moderate, server, known, tmp_path):
    done, rows = moderate(server.at("tables/bytes.parquet"), server, "--id-column", "id")
    assert done.returncode == 0, done.stderr
    assert {row["source"]: said_of(row) for row in rows} == known
    done, rows = moderate(server.at("tables/paths.parquet"), server, "--restart")
    assert done.returncode == 0, done.stderr
    assert said_of(rows[0]) == next(iter(known.values()))
    assert [row["error"] for row in rows[1:]] == ["not_found", "not_found"]


@pytest.mark.parametrize("source", ["{scheme}://none/x/", "{scheme}://none/*.png", "{there}nothing.tar", "{there}x/"])
def test_what_is_not_there_is_said_before_anything_is_read(moderate, server, source):
    source = source.format(scheme=server.scheme, there=server.at(""))
    done, rows = moderate(source, server)
    assert done.returncode == 1 and not rows
    assert source in done.stderr and ("no such " in done.stderr or "matches no file" in done.stderr)


@pytest.fixture(scope="module")
def s3(files):
    with S3() as running:
        for number in range(60):
            running.put(f"a/{number}.png", list(files.values())[number % 10] + bytes([number]))
        yield running


@pytest.mark.parametrize("fault", ["none", "half", "no such profile", "wrong"])
def test_credentials_that_are_missing_or_wrong_name_what_to_set(moderate, s3, fault):
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    s3.accept_anybody(fault != "wrong")
    profile = {"AWS_PROFILE": "nobody"} if fault == "no such profile" else {}
    without = {"none": keys, "half": keys[1:]}.get(fault, ())
    done, rows = moderate(s3.at("a/"), s3, without=without, **profile)
    assert done.returncode == 1 and not rows
    assert "no credentials that the bucket's server accepts" in done.stderr and all(key in done.stderr for key in keys)


def test_a_public_bucket_needs_no_credentials(moderate, s3):
    s3.accept_anybody(True)
    without = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    done, rows = moderate(s3.at("a/"), s3, without=without, FSSPEC_S3_ANON="true")
    assert done.returncode == 0 and len(rows) == 60, done.stderr


def test_a_server_that_is_away_is_named(moderate, s3):
    done, _ = moderate(s3.at("a/"), s3, AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert done.returncode == 75 and "AWS_ENDPOINT_URL is http://127.0.0.1:1" in done.stderr


def test_credentials_that_expire_end_the_run_and_no_image(pair, moderate, s3, policy, tmp_path):
    s3.accept_anybody(True)
    options = ["--under-way", "2", "--progress-seconds", "0.1"]
    command = ["moderate", s3.at("a/"), "--policy", policy, "--out", tmp_path / "out.parquet", *pair.arguments()]
    with Background(sys.executable, "-m", "lookonce", *map(str, command), *options, **s3.env) as run:
        run.wait_for(r"[1-9]\d* of 60 images")
        s3.accept_anybody(False)
        assert run.wait_exit() == 1, run.output
        assert "no credentials that the bucket's server accepts" in run.output
    s3.accept_anybody(True)
    done, rows = moderate(s3.at("a/"), s3)
    assert done.returncode == 0 and "going on after" in done.stderr
    assert len(rows) == 60 and {row["error"] for row in rows} <= {None, "image_invalid"}
