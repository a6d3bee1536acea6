"""Engines by name, in real processes: what an engine does not need is not there."""

from __future__ import annotations

import os

import pytest

from lm_service.app import load
from lm_service.settings import LanguageSettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.process import PERMANENT_EXIT
from lookonce.core.rpc.client import LanguageClient
from lookonce.core.stores import open_store
from protos.lookonce.v1 import language_pb2
from tests import other_engines
from tests.images import photograph
from tests.lm.split import Tower, answer, asking, running, user
from tests.processes import ROOT, ServiceProcess

CAT = photograph("chelsea", (90, 60))
MODULES = """
import sys

def tell():
    heavy = {"torch", "transformers", "llvmlite"} & sys.modules.keys()
    print("HEAVY", sorted(heavy), "after", "lm_service.servicer" in sys.modules, flush=True)

import lookonce.core.process as process
leave = process.leave
process.leave = lambda status: (tell(), leave(status))
"""
"""A sitecustomize: what is imported when the process ends."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The other engines' package, for this process and those it starts."""
    directory = other_engines.install(tmp_path_factory.mktemp("site-packages"))
    (directory / "sitecustomize.py").write_text(MODULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(directory), str(ROOT)]))
        yield directory


async def test_a_process_whose_engine_needs_no_torch_has_none(installed, checkpoint_path, tmp_path):
    reference, record = Tower(checkpoint_path).record(CAT)
    store = open_store(f"file://{tmp_path}/store")
    await store.put(reference.key, record.serialize())
    await store.close()
    arguments = ["--model", str(checkpoint_path), "--engine", "echo", "--store", f"file://{tmp_path}/store"]
    alone = {"PYTHONPATH": os.environ["PYTHONPATH"]}  # in a process of its own, that has imported nothing before
    with ServiceProcess("lm_service", *arguments, env=alone) as service:
        client = LanguageClient(service.address)
        reply = await answer(client, asking(user(reference, "What is this?"), max_tokens=500, ignore_eos=True))
        assert "What is this?" in reply.text
        assert reply.finish.receipt.embedding == language_pb2.STORE
        assert len(reply.ids) == reply.finish.usage.prompt_tokens > reference.tokens
        item = language_pb2.ScoreItem(messages=[user(reference, "A cat?")], choices=["yes", "no"])
        scores = await client.score(language_pb2.ScoreRequest(items=[item]), timeout=30)
        assert [choice.logprob for choice in scores.results[0].scores.choices] == [-2.0, -1.0]  # tokens of each
        assert (await client.describe()).model.device == "none"
        await client.close()
        assert service.terminate() == 0
        assert "HEAVY [] after True" in service.log


async def test_transformers_generate_serves_behind_the_same_socket(
    installed, checkpoint_path, unsplit, tower, tmp_path
):
    reference, record = tower.record(CAT)
    store = open_store(f"file://{tmp_path}/store")
    await store.put(reference.key, record.serialize())
    await store.close()
    async with running(checkpoint_path, tmp_path, store=f"file://{tmp_path}/store", engine="turns") as client:
        reply = await answer(client, asking(user(reference, "What is this?"), max_tokens=8))
    assert reply.ids == unsplit.answer_ids([("user", [CAT, "What is this?"])], 8)


def test_an_engine_that_cannot_be_had_ends_the_start(installed, checkpoint_path):
    for name, said in (("steam", "auto, broken, echo, packed, plain, turns"), ("broken", "can't be imported")):
        with pytest.raises(LookonceError, match=said) as caught:
            load(LanguageSettings(model=str(checkpoint_path), engine=name))
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    environment = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    service = ServiceProcess("lm_service", "--model", str(checkpoint_path), "--engine", "steam", env=environment)
    try:
        assert service.wait_exit() == PERMANENT_EXIT
        assert "engine 'steam' is not one of" in service.log.splitlines()[-2]  # the last is ours
    finally:
        service.close()
