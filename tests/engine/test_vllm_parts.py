"""What of vLLM's engine needs no vLLM: turns, names, arguments, files of rows. The rest: `make test-vllm`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest
import torch

from lm_service.engine.factory import builder_of
from lm_service.engine.vllm.arguments import DENIED, parse_engine_args
from lm_service.engine.vllm.identifiers import Identifiers
from lm_service.engine.vllm.turns import Firsts, Turns
from lm_service.settings import LanguageSettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.models.row_files import RowDirectory
from tests.engine.lab import an_image


@pytest.mark.parametrize("name", sorted(DENIED))
def test_what_would_break_the_contract_is_refused_by_name(name):
    for spelled in (name, "--" + name.replace("_", "-")):
        with pytest.raises(LookonceError) as caught:
            parse_engine_args(f'{{"{spelled}": 1}}')
        assert caught.value.param == "engine_args" and name in caught.value.message


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_engine_args_that_are_no_object_are_refused(text):
    with pytest.raises(LookonceError, match="--engine-args"):
        parse_engine_args(text)


def test_other_arguments_pass():
    assert parse_engine_args('{"--enforce-eager": true, "swap_space": 2}') == {"enforce_eager": True, "swap_space": 2}
    assert parse_engine_args(None) == {}


def test_without_vllm_the_remedy_is_told():
    with pytest.raises(LookonceError) as caught:
        builder_of(LanguageSettings(model="x", engine="vllm"))
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT and "scripts/setup_vllm.sh" in caught.value.message


def test_an_erased_image_has_another_name_ever_after():
    names, one, other = Identifiers(), an_image(1), an_image(2)
    before = names.of(one), names.of(other)
    assert before == (names.of(one), names.of(other)) and before[0] != before[1] and len(before[0]) == 64
    names.erase([one.key])
    assert names.of(one) not in before and names.of(other) == before[1]
    names.erase([other.image_digest])
    assert names.of(other) != before[1]
    assert Identifiers().of(one) != before[0], "a name is this process's own"


async def test_some_share_and_one_is_alone():
    turns, seen = Turns(), []

    async def work(kind, name):
        async with turns.alone() if kind == "alone" else turns.shared():
            seen.append(("in", name))
            await asyncio.sleep(0.01)
            seen.append(("out", name))

    kinds = ["shared", "shared", "alone", "shared"]
    async with asyncio.TaskGroup() as group:
        for name, kind in enumerate(kinds):
            group.create_task(work(kind, name))
    assert turns.idle
    assert seen[:2] == [("in", 0), ("in", 1)]
    assert seen[4:6] == [("in", 2), ("out", 2)], seen


async def test_who_is_cancelled_while_it_waits_holds_nobody_up():
    turns = Turns()
    async with turns.shared():
        waiting = asyncio.create_task(_alone(turns))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        async with asyncio.timeout(1), turns.shared():
            pass
    assert turns.idle


async def _alone(turns):
    async with turns.alone():
        raise AssertionError("somebody shares")


async def test_one_computes_a_prefix_and_the_others_wait():
    firsts, computing, most = Firsts(2), 0, 0

    async def ask(fails=False):
        nonlocal computing, most
        async with firsts.turn("prefix") as computed:
            computing += 1
            most = max(most, computing)
            await asyncio.sleep(0.01)
            computing -= 1
            if fails:
                raise ZeroDivisionError
            computed()

    failing = asyncio.create_task(ask(fails=True))
    await asyncio.sleep(0)
    asked = [asyncio.create_task(ask()) for _ in range(3)]
    with pytest.raises(ZeroDivisionError):
        await failing
    await asyncio.sleep(0.005)
    assert most == 1, "two computed it at once"
    await asyncio.gather(*asked)
    async with firsts.turn(None) as computed:  # nothing to share
        computed()
    assert firsts.forget(lambda prefix: prefix == "prefix") == 1 and firsts.forget(lambda prefix: True) == 0


def test_rows_come_back_and_a_dead_process_leaves_no_files(tmp_path):
    directory = RowDirectory(tmp_path, "rows-")
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(5, 7).to(dtype)
        file = directory.write(rows)
        assert torch.equal(file.rows(), rows) and file.nbytes == rows.nbytes
        mapped = file.rows()
        mapped[0] = 0
        assert torch.equal(file.rows(), rows), "what one process writes is its own"
        file.remove()
        assert mapped[1, 1] == rows[1, 1]
    code = "import sys; from pathlib import Path; import torch; from lookonce.models.row_files import RowDirectory\n"
    code += "d = RowDirectory(Path(sys.argv[1]), 'rows-'); d.write(torch.ones(2, 2)); print(d.path, flush=True)\n"
    code += "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        left = process.stdout.readline().strip()
        RowDirectory(tmp_path, "rows-").close()
        assert list((tmp_path / left).iterdir()), "a living process's files were taken"
        process.kill()
    deadline = time.monotonic() + 10
    while (tmp_path / left).exists() and time.monotonic() < deadline:
        RowDirectory(tmp_path, "rows-").close()
    assert not (tmp_path / left).exists()
    assert directory.path.exists()
    directory.close()
    assert not list(tmp_path.iterdir())
