"""What of the engine meets vLLM's own classes: the connector's halves, the checks at start, refusals of settings."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.engine.arg_utils import AsyncEngineArgs

from lm_service.engine.types import ImageSpan, Sampling
from lm_service.engine.vllm import connector, worker
from lm_service.engine.vllm.arguments import DENIED
from lm_service.engine.vllm.build import VllmBuilder
from lm_service.engine.vllm.checks import check_model
from lm_service.engine.vllm.connector import RowFileConnector
from lm_service.engine.vllm.requests import NamedImage, answer_params, engine_input
from lm_service.settings import LanguageSettings
from lookonce.core.errors import LookonceError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.row_files import RowDirectory
from lookonce.models.self_check import SelfCheckFailed
from tests.engine.lab import an_image

pytestmark = pytest.mark.vllm
WIDTH = 6


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    """These tests may outlive whoever started them."""
    monkeypatch.setattr(connector, "end_with_parent", lambda: None)


def connectors(backend="mp"):
    """The scheduler's and a worker's."""
    transfer = SimpleNamespace(ec_connector_extra_config={"width": WIDTH}, is_ec_producer=False, is_ec_consumer=True)
    config = SimpleNamespace(
        ec_transfer_config=transfer,
        model_config=SimpleNamespace(dtype=torch.float32),
        parallel_config=SimpleNamespace(distributed_executor_backend=backend, nnodes=1),
    )
    return [RowFileConnector(config, role) for role in (ECConnectorRole.SCHEDULER, ECConnectorRole.WORKER)]


def request_about(file, tokens):
    """As vLLM's scheduler holds it."""
    given = engine_input([1, *[9] * tokens, 2], [NamedImage(1, tokens, (1, 2, 2 * tokens), "name", file)], "salt")
    feature = SimpleNamespace(
        data=given["mm_kwargs"]["image"][0],
        identifier=given["mm_hashes"]["image"][0],
        mm_position=given["mm_placeholders"]["image"][0],
    )
    return SimpleNamespace(request_id="r", mm_features=[feature])


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_rows_reach_a_worker_by_a_file_or_with_the_step_to_other_machines(tmp_path, backend):
    directory, rows = RowDirectory(tmp_path, "rows-"), torch.randn(4, WIDTH)
    scheduler, taking = connectors(backend)
    request = request_about(directory.write(rows), 4)
    assert scheduler.ensure_cache_available(request, 0) and scheduler.has_cache_item("name")
    scheduler.update_state_after_alloc(request, 0)
    step = scheduler.build_connector_meta(None)
    assert isinstance(step.by_identifier["name"], torch.Tensor) == (backend == "ray")
    assert not scheduler.build_connector_meta(None).by_identifier, "each step has its own"
    cache: dict[str, torch.Tensor] = {}
    taking.bind_connector_metadata(step)
    taking.start_load_caches(cache)
    assert torch.equal(cache["name"], rows)
    directory.close()


def test_a_request_whose_file_has_gone_ends_alone(tmp_path):
    directory = RowDirectory(tmp_path, "rows-")
    file = directory.write(torch.randn(4, WIDTH))
    scheduler, _ = connectors()
    request = request_about(file, 4)
    file.remove()
    assert scheduler.ensure_cache_available(request, 5), "its KV is there"
    assert not scheduler.take_unavailable_requests()
    assert not scheduler.ensure_cache_available(request, 4)
    assert scheduler.take_unavailable_requests() == {"r"}
    scheduler.request_finished(request)
    assert not scheduler.take_unavailable_requests()


class Answering:
    """An AsyncLLM whose workers say this."""

    def __init__(self, names, positions):
        self._answers = {"lookonce_parameters": names, "lookonce_positions": positions}

    async def collective_rpc(self, method, args=()):
        found = self._answers[method]
        return [found(*args) if callable(found) else found]


async def test_a_vision_weight_or_another_place_of_an_image_ends_the_start(checkpoint_path):
    checkpoint = open_checkpoint(str(checkpoint_path), needs=Half.LANGUAGE)

    def right(ids, images):
        layout = [(offset, grid) for offset, _, grid in images]
        rows, following = checkpoint.family.positions(checkpoint.config, len(ids), layout)
        return [[following], *np.array(rows).tolist()]

    def moved(ids, images):
        following, *rows = right(ids, images)
        return [following, *(np.array(rows) + 1).tolist()]

    await check_model(Answering(["language_model.model.norm.weight"], right), checkpoint)
    with pytest.raises(SelfCheckFailed, match=r"visual.patch_embed"):
        await check_model(Answering(["visual.patch_embed.proj.weight"], right), checkpoint)
    for other in (moved, lambda ids, images: [[0], *right(ids, images)[1:]]):
        with pytest.raises(SelfCheckFailed, match="elsewhere"):
            await check_model(Answering([], other), checkpoint)


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint

    return make_random_checkpoint(tmp_path_factory.mktemp("checks") / "tiny", size="tiny")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"engine_args": '{"steam": 1}'}, "engine_args"),
        ({"device": "mps"}, "device"),
        ({"device_map": "cuda:0,cuda:1"}, "device_map"),
        ({"quantization": "int8"}, "quantization"),
    ],
)
def test_settings_that_it_does_not_have_are_refused(changed, field):
    with pytest.raises(LookonceError) as caught:
        VllmBuilder(LanguageSettings(model="x", engine="vllm", **changed))
    assert caught.value.param == field


def test_the_names_that_are_refused_are_vllms():
    """A name that vLLM has renamed would be let through."""
    server = {"api_server_count", "headless", "return_sampling_mask", "enable_trace_replay"}  # its server's, and newer
    assert not set(DENIED) - set(AsyncEngineArgs.__dataclass_fields__) - server


def test_sampling_parameters_say_the_same():
    wanted = Sampling(9, 0.7, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.1, seed=5, logprobs=2, min_tokens=4)
    params = answer_params(wanted, {7, 3}, 1, 6)
    assert (params.max_tokens, params.min_tokens, params.stop_token_ids) == (6, 4, [3, 7])
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.5, 3, 0.1)
    assert params.seed != answer_params(wanted, {7}, 0, 6).seed == 5
    assert answer_params(Sampling(9, ignore_eos=True), {7}, 0, 6).stop_token_ids == []
    assert answer_params(Sampling(9, min_tokens=8), {7}, 0, 6).min_tokens == 6
    steered = Sampling(9, bias=((4, 2.0),), allowed=(4, 5), bad_words=((4, 5), (6,)), stop_ids=(9,), ignore_eos=True)
    params = answer_params(steered, {7}, 0, 6)
    assert (params.logit_bias, params.allowed_token_ids, params.stop_token_ids) == ({4: 2.0}, [4, 5], [9])
    assert params._bad_words_token_ids == [[4, 5], [6]]
    assert ImageSpan(0, an_image(1)).tokens and worker.WorkerExtension


@pytest.mark.parametrize("invariant", [False, True])
async def test_isolated_scores_share_steps_only_where_vllm_is_batch_invariant(invariant, checkpoint_path):
    """Each has KV of its own; whether two are under way at once follows from vLLM's mode."""
    from lm_service.engine.packed.options import PackedOptions
    from lm_service.engine.types import ModelFacts, ScoreItem, Scoring
    from lm_service.engine.vllm.engine import PromptBounds, VllmEngine
    from lm_service.engine.vllm.statistics import Statistics
    from tests.engine.lab import TOKENS, prompt, words

    under_way, most, salts = 0, 0, set()

    class Slow:
        errored = False

        async def generate(self, given, params, name, priority):
            nonlocal under_way, most
            salts.add(given["cache_salt"])
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.01)
            under_way -= 1
            logprobs = [{token: SimpleNamespace(logprob=-1.0, rank=1) for token in params.logprob_token_ids}]
            output = SimpleNamespace(token_ids=[1], logprobs=logprobs, finish_reason=None)
            yield SimpleNamespace(outputs=[output], num_cached_tokens=0)

        def shutdown(self):
            pass

    bounds = PromptBounds(512, 3, WIDTH, 500, 2, 100, 16, batch_invariant=invariant)
    directory = SimpleNamespace(close=lambda: None, write=lambda rows: SimpleNamespace(path="/x", remove=lambda: None))

    async def check():
        return None

    engine = VllmEngine(
        Slow(), Statistics(), directory, torch.float32, TOKENS, set(), 400, PackedOptions(), bounds, ModelFacts(), check
    )
    engine._warm_up = check
    await engine.start(None)
    items = tuple(ScoreItem(prompt(words(9, seed)), ((5,), (6,))) for seed in range(4))
    scores = await engine.score(Scoring("s", items, isolated=True))
    assert scores.logprobs == ((-1.0, -1.0),) * 4 and len(salts) == 4
    assert most == (4 if invariant else 1)
    assert engine.describe().batch_invariant is invariant
    await engine.close()
