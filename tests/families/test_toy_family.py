"""A family that only an entry point names goes through every door, and answers as its unsplit model does."""

from __future__ import annotations

import ast
import base64
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.prompt import Message, PromptBuilder, load_template
from lookonce.core.errors import CheckpointError
from lookonce.core.identity import EmbeddingReference
from lookonce.models.checkpoint import open_checkpoint
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.registry import BUILTIN, Half, family_of, supported_model_types
from tests import toy_family
from tests.cli.commands import invoke
from tests.engine.lab import Album, ask, generation
from tests.images import photograph
from tests.processes import ROOT
from tests.system.cluster import System
from tests.toy_family.synthetic import SPEAKER, write

IMAGE = photograph("chelsea", (150, 100))
OTHER = photograph("coffee", (64, 96))
QUESTION, CHOICES = "What is on it?", ["yes", "no", "a cat"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The toy's package, for this process and those it starts."""
    directory = toy_family.install(tmp_path_factory.mktemp("site-packages"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(directory), str(ROOT)]))
        yield directory


@pytest.fixture(scope="module")
def checkpoint(installed, tmp_path_factory):
    return write(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def halves(checkpoint):
    out = checkpoint.with_name("halves")
    done = invoke("split", checkpoint, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def system(halves, tmp_path_factory):
    with System(halves, tmp_path_factory.mktemp("system")) as one:
        yield one


class Unsplit:
    """The toy as its maker would write it: a user's texts and images, everything computed anew for each token."""

    def __init__(self, path):
        self.tensors = load_file(path / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.ids = {token: self.tokenizer.token_to_id(token) for token in ("<turn>", "<end>", "<pic>", "<eol>")}

    def weight(self, name):
        return self.tensors[f"{name}.weight"] if f"{name}.weight" in self.tensors else self.tensors[name]

    def rows(self, image):
        """[rows, columns, width] of an image whose sides are cut down to multiples of 16."""
        width, height = (side // 16 * 16 for side in image.size)
        pixels = torch.from_numpy(np.array(image.resize((width, height)))).float() / 255 - 0.5
        h, w = height // 8, width // 8
        x = pixels.view(h, 8, w, 8, 3).transpose(1, 2).reshape(h * w, 192) @ self.weight("tower.patch").T
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float()
        x[:, :4] += torch.cat([place.sin(), place.cos()], 1)
        for number in range(2):
            block = f"tower.blocks.{number}"
            normed = functional.rms_norm(x, (32,), self.weight(f"{block}.norm"), 1e-6)
            q, k, v = ((normed @ part.T).view(h * w, 2, 16) for part in self.weight(f"{block}.qkv").chunk(3))
            seen = (torch.einsum("ihd,jhd->hij", q, k) / 4).softmax(-1)
            x = x + torch.einsum("hij,jhd->ihd", seen, v).reshape(h * w, 32) @ self.weight(f"{block}.proj").T
            x = x + functional.gelu(x @ self.weight(f"{block}.up").T) @ self.weight(f"{block}.down").T
        cells = x.view(h // 2, 2, w // 2, 2, 32).mean((1, 3))
        return cells @ self.weight("tower.out").T

    def prompt(self, *parts):
        """Token ids and their embeddings [T, width] of a user's message, up to where the assistant is to speak."""
        ids, vectors = [], []

        def say(*tokens):
            ids.extend(tokens)
            vectors.append(self.tensors["speaker.table"][list(tokens)])

        say(self.ids["<turn>"], *self.text("user\n"))
        for part in parts:
            if isinstance(part, str):
                say(*self.text(part))
                continue
            for row in self.rows(part):
                ids.extend([self.ids["<pic>"]] * len(row))
                vectors.append(row)
                say(self.ids["<eol>"])
        say(self.ids["<end>"], self.ids["<turn>"], *self.text("assistant\n"))
        return ids, torch.cat(vectors)

    def text(self, words):
        return self.tokenizer.encode(words, add_special_tokens=False).ids

    def logits(self, x):
        """[T, vocabulary] of a sequence's embeddings."""
        length = len(x)
        angles = torch.outer(torch.arange(length), 10_000.0 ** -(torch.arange(0, 16, 2) / 16))[:, None]

        def turn(y):
            a, b = y.chunk(2, -1)
            return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

        for number in range(SPEAKER["depth"]):
            layer = f"speaker.layers.{number}"
            normed = functional.rms_norm(x, (64,), self.weight(f"{layer}.norm"), 1e-6)
            q, k, v = ((normed @ self.weight(f"{layer}.{name}").T).view(length, -1, 16) for name in "qkv")
            k, v = (y.repeat_interleave(2, 1) for y in (turn(k), v))
            scores = torch.einsum("ihd,jhd->hij", turn(q), k) / 4
            seen = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
            x = x + torch.einsum("hij,jhd->ihd", seen, v).reshape(length, 64) @ self.weight(f"{layer}.o").T
            normed = functional.rms_norm(x, (64,), self.weight(f"{layer}.mlp_norm"), 1e-6)
            gate, up = (normed @ self.weight(f"{layer}.{name}").T for name in ("gate", "up"))
            x = x + (functional.silu(gate) * up) @ self.weight(f"{layer}.down").T
        return functional.rms_norm(x, (64,), self.tensors["speaker.norm"], 1e-6) @ self.tensors["speaker.head"].T

    def extended(self, x, tokens):
        return torch.cat([x, self.tensors["speaker.table"][list(tokens)]])

    def answer(self, *parts, length=12):
        """The greedy answer."""
        _, x = self.prompt(*parts)
        answer = []
        for _ in range(length):
            token = int(self.logits(x)[-1].argmax())
            if token == self.ids["<end>"]:
                break
            answer.append(token)
            x = self.extended(x, [token])
        return self.tokenizer.decode(answer)

    def weighed(self, choices, *parts):
        """The probability of each choice among them."""
        _, x = self.prompt(*parts)
        sums = []
        for choice in choices:
            tokens = self.text(choice)
            told = self.logits(self.extended(x, tokens)).log_softmax(-1)[len(x) - 1 : -1]
            sums.append(sum(float(row[token]) for row, token in zip(told, tokens, strict=True)))
        return dict(zip(choices, torch.tensor(sums).softmax(0).tolist(), strict=True))


@pytest.fixture(scope="module")
def unsplit(checkpoint):
    return Unsplit(checkpoint)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def test_the_family_is_found_by_its_entry_point_alone(installed):
    assert "toy_vl" in supported_model_types()
    assert family_of({"model_type": "toy_vl"}).label == "Toy"


def test_a_family_that_cannot_be_imported_is_said_to_be_broken(tmp_path, monkeypatch):
    toy_family.install(tmp_path, model_type="half_vl", leads_to="tests.toy_family.nowhere:FAMILY")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match="'half_vl': its family is installed, but can't be imported"):
        family_of({"model_type": "half_vl"})


def test_the_halves_have_the_embeddings_of_the_whole(checkpoint, halves):
    whole, half = (open_checkpoint(str(path), needs=Half.VISION) for path in (checkpoint, halves / "vision"))
    assert whole.encoder_spec("float32").fingerprint() == half.encoder_spec("float32").fingerprint()
    assert {str(file.name) for file in (halves / "language").iterdir()} >= {"tokenizer.json", "chat_template.json"}
    assert check_checkpoint(str(halves)).problems == ()


def test_questions_and_choices_are_answered_as_by_the_unsplit_model(system, unsplit):
    image = system.upload(png(IMAGE))
    assert image["tokens"] == len(unsplit.rows(IMAGE).flatten(0, 1)) == 54
    asked = [QUESTION, "Why?", {"text": QUESTION, "choices": CHOICES}, {"text": "Well?", "choices": CHOICES}]
    *written, first, second = system.ask(image["id"], asked, temperature=0, max_tokens=12)
    assert [answer["text"] for answer in written] == [unsplit.answer(IMAGE, text) for text in (QUESTION, "Why?")]
    assert first["choices"] == pytest.approx(unsplit.weighed(CHOICES, IMAGE, QUESTION), abs=1e-4)
    assert second["choices"] == pytest.approx(unsplit.weighed(CHOICES, IMAGE, "Well?"), abs=1e-4)
    (again,) = system.ask(image["id"], ["And why?"], temperature=0, max_tokens=12)
    assert again["text"] == unsplit.answer(IMAGE, "And why?") and again["receipt"]["prefix"] == "hit"
    # Markers are tokens of the prompt, and no rows of the embedding.
    ids, _ = unsplit.prompt(IMAGE, QUESTION)
    assert written[0]["usage"]["prompt_tokens"] == len(ids)


def test_images_between_texts(system, unsplit):
    parts = ("First ", IMAGE, ", then ", OTHER, ": which?")
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url(part)}}
        for part in parts
    ]
    reply = system.chat([{"role": "user", "content": content}], max_tokens=12)
    assert reply["choices"][0]["message"]["content"] == unsplit.answer(*parts)


class Rows(Album):
    """An EmbeddingLoader of one image."""

    def __init__(self, rows):
        super().__init__(rows.shape[1])
        self.rows = lambda reference: rows


@pytest.mark.parametrize("native", [True, False])
async def test_prefills_of_a_few_tokens_end_anywhere_among_rows_and_markers(checkpoint, unsplit, native):
    opened, cpu = open_checkpoint(str(checkpoint), needs=Half.LANGUAGE), torch.device("cpu")
    model = opened.family.load_text(opened, torch.float32, lambda name: cpu, [cpu, cpu], native=native)
    template = load_template(checkpoint, opened.family)
    rows = unsplit.rows(IMAGE)
    grid = (1, 2 * len(rows), 2 * len(rows[0]))
    reference = EmbeddingReference(bytes(32), "0" * 64, bytes(32), grid, rows[..., 0].numel(), *IMAGE.size)
    limits = {"context_length": 1000, "max_images": 1, "check_fingerprint": lambda reference: None}
    builder = PromptBuilder(template, opened.family, opened.config, **limits)
    prompts = [builder.build([Message("user", (reference, text))]) for text in (QUESTION, "Why?")]
    ids, _ = unsplit.prompt(IMAGE, QUESTION)
    assert list(prompts[0].token_ids) == ids and prompts[0].positions.tolist() == [list(range(len(ids)))]
    options = PackedOptions(kv_bytes=4 << 20, prefix_bytes=4 << 20, step_tokens=7, burst_tokens=7, native=native)
    engine = PackedEngine(model, template.table, frozenset({unsplit.ids["<end>"]}), options)
    await engine.start(Rows(rows.flatten(0, 1)))
    try:
        for text, prompt in zip((QUESTION, "Why?"), prompts, strict=True):
            (answer,) = await ask(engine, generation(prompt, 12, logprobs=None))
            assert answer.text == unsplit.answer(IMAGE, text)
    finally:
        await engine.close()


def test_plan_and_doctor_know_its_figures(checkpoint, tmp_path):
    done = invoke("plan", "--model", checkpoint, "--gpus", "24", "--image", "150x100", "--json")
    assert done.returncode == 0, done.stderr
    (placement,) = json.loads(done.stdout)
    counted = dict.fromkeys(Half, 0)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        counted[Half.VISION if name.startswith("tower.") else Half.LANGUAGE] += 4 * tensor.numel()
    assert placement["vision_need"]["weights"] == counted[Half.VISION]
    assert placement["language_need"]["weights"] == counted[Half.LANGUAGE]
    assert "54 tokens (150x100)" in invoke("plan", "--model", checkpoint, "--ram", "1", "--image", "150x100").stdout
    done = invoke("doctor", "--model", checkpoint, "--data-dir", tmp_path, "--port", "0", "--json")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["checkpoint"]["status"] == "ok" and "whole, both halves" in found["checkpoint"]["detail"]
    assert "16384 pixels" in found["images"]["detail"]  # the family's own bound on a CPU


def test_what_is_wrong_with_its_checkpoint_is_said_in_its_words(checkpoint, tmp_path):
    broken = write(tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"row_end_token": 10_000}))
    (broken / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].role }}"}))
    told = "\n".join(check_checkpoint(str(broken)).problems)
    assert "row_end_token must be the id of a token, below vocab_size 260" in told
    (broken / "config.json").write_text(json.dumps(config))
    told = "\n".join(check_checkpoint(str(broken)).problems)
    assert "instruction-tuned Toy" in told and "Qwen" not in told


@pytest.mark.parametrize("family", BUILTIN)
def test_nothing_but_folders_of_families_and_a_line_of_the_registry_names_our_own(family):
    """What holds for the toy holds for ours; a family may share what another one has."""
    folders = [ROOT / "lookonce/models" / name.partition("/")[0] for name in BUILTIN]
    found = {path for package in PRODUCT for path in names_of(ROOT / package, family)}
    outside = {str(path.relative_to(ROOT)) for path in found if path.parent not in folders}
    assert outside - {"gateway/http/examples.py"} == {"lookonce/models/registry.py"}  # the documents' examples show one


def test_the_rule_sees_a_planted_fault(tmp_path):
    (tmp_path / "one.py").write_text("from lookonce.models.qwen2_vl.config import FAMILY\n")
    (tmp_path / "other.py").write_text("def f():\n    return load('lookonce.models.qwen2_vl.config')\n")
    (tmp_path / "third.py").write_text('"""Unlike qwen2_vl, of which a docstring may tell."""\n')
    assert {path.name for path in names_of(tmp_path, "qwen2_vl")} == {"one.py", "other.py"}


PRODUCT = ("lookonce", "gateway", "vision_service", "lm_service")


def names_of(folder, family):
    """Files that import from a family's folder or name it in a string, docstrings and its own folder left out."""
    for path in sorted(folder.rglob("*.py")):
        if family in path.parts:
            continue
        tree = ast.parse(path.read_text())
        told = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            module = node.module if isinstance(node, ast.ImportFrom) else None
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module]
            if (isinstance(text, str) and text not in told and family in text) or any(
                family in (name or "") for name in imported
            ):
                yield path
                break


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
