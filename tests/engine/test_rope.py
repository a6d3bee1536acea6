"""Beyond the trained context the engine's answers are those of transformers, whichever way positions are stretched."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lm_service.app import load
from lm_service.settings import LanguageSettings
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.engine.lab import Lab, an_image, ask, generation, prompt, words

TRAINED = 64
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
STRETCHED = {
    "as Qwen advises": YARN,
    "rope_type": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": TRAINED},
    "without the trained context": {"type": "yarn", "factor": 4.0},
    "with an attention factor": YARN | {"attention_factor": 1.25},
    "with scales": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
    "with other edges": YARN | {"beta_fast": 3, "beta_slow": 0.5},
    "not rounded": YARN | {"truncate": False, "beta_fast": 5},
    "linear": {"type": "linear", "factor": 3.0},
}


def stretched(path, out, layout, rope):
    own = shutil.copytree(path, out)
    config = json.loads((own / "config.json").read_text())
    text = config["text_config"] if layout == "nested" else config
    name = "rope_parameters" if layout == "nested" else "rope_scaling"
    kept = {key: value for key, value in text[name].items() if key in ("mrope_section", "rope_theta")}
    # linear stretching has no trained context beside it: config.json states the whole
    text |= {name: kept | rope, "max_position_embeddings": 3 * TRAINED if rope["factor"] == 3 else TRAINED}
    (own / "config.json").write_text(json.dumps(config))
    return own


def lab_of(path):
    """Whose engine runs over our own modules, and whose logits are of transformers'."""
    lab, checkpoint = Lab(path), open_checkpoint(str(path), needs=Half.LANGUAGE)
    device = torch.device("cpu")
    lab.adapter = checkpoint.family.load_text(checkpoint, torch.float32, lambda name: device, [device] * 2)
    return lab


@pytest.fixture(scope="module", params=["published", "nested"])
def plain(request, tmp_path_factory):
    path = make_random_checkpoint(tmp_path_factory.mktemp("rope") / "model", layout=request.param)
    return request.param, path


@pytest.mark.parametrize("rope", STRETCHED.values(), ids=STRETCHED)
async def test_answers_far_beyond_the_trained_context(plain, tmp_path, rope):
    layout, path = plain
    lab = lab_of(stretched(path, tmp_path / "own", layout, rope))
    unstretched = Lab(path)
    wanted = prompt(words(50, 1), an_image(1), words(40, 2))
    async with lab.engine() as engine:
        (answer,) = await ask(engine, generation(wanted, 6))
    lab.check(wanted, answer)
    unstretched.album = lab.album
    with pytest.raises(AssertionError):
        unstretched.check(wanted, answer)


def test_the_context_is_as_long_as_it_is_stretched_to(plain, tmp_path):
    layout, path = plain
    own = stretched(path, tmp_path / "own", layout, YARN)
    assert lab_of(own).adapter.shape.context == 4 * TRAINED
    model = load(LanguageSettings(model=str(own), kernels="torch"))
    assert model.engine.describe().model.context_length == 4 * TRAINED
    checkpoint = open_checkpoint(str(stretched(path, tmp_path / "linear", layout, STRETCHED["linear"])))
    assert checkpoint.family.text_config(checkpoint.config)["max_position_embeddings"] == 3 * TRAINED
