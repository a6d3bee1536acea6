"""docs/models.md: what each family has, as its tests declare it. `python -m tests.families` writes it.

A module of this folder that tests a family has a `SERVED`, one `Served` or several: for each column the test that holds
it.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.processes import ROOT

FOLDER = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "models.md"
_CLASS = "is not served by the general path: "


@dataclass(frozen=True)
class No:
    """What a family doesn't have, and the test that holds how it is refused."""

    test: str


@dataclass(frozen=True)
class Plain:
    """What the plain engine gives instead, and the test that holds it."""

    test: str


@dataclass(frozen=True)
class Served:
    """A family. Tests are "file::name", the file below tests/, or a name of the declaring module."""

    models: str
    model_type: str
    split: str
    packed: str | Plain
    prefix: str | No
    scores: str | No
    video: str | No
    quantised: str | No

    @property
    def cells(self) -> list[str | No | Plain]:
        """What the columns of `COLUMNS` hold."""
        return [getattr(self, name) for name in COLUMNS]


COLUMNS = {
    "split": "split exact",
    "packed": "packed exact",
    "prefix": "prefix reused",
    "scores": "scores",
    "video": "video",
    "quantised": "int8",
}
QWEN2_VL = Served(  # the tests of everything else are its tests
    "Qwen2-VL 2B, 7B, 72B",
    "qwen2_vl",
    split="system/test_parity.py::test_one_image_of_every_kind",
    packed="engine/test_exactness.py::test_32_neighbours",
    prefix="engine/test_exactness.py::test_one_image",
    scores="lm/test_service.py::test_scores_are_the_unsplit_models",
    video=No("families/test_models_page.py::test_video_is_no_part_of_a_chat"),
    quantised="system/test_int8.py::test_halves_in_int8_answer_together",
)
HEAD = """\
# Models

Checkpoints of these families are served, and their fine-tunes. Tests hold every cell of the table, with random weights
of true architecture. This page is made from them: `python -m tests.families`.

"""
FOOT = """
- **Split exact**: the two services answer greedily as the unsplit model of transformers does, in float32.
- **Packed exact**: questions that are computed in one step are answered as they are alone.
- **Prefix reused**: a further question about an image computes its own text only.
- **Scores**: choices have the probabilities that the unsplit model gives them.
- **Plain** instead of packed: the plain engine serves it exactly, by transformers' own way of generating. That costs:
  one request at a time, and no shared prefix, so every question computes its image's tokens again. An image is still
  encoded once. Sampling, scores, streams and deadlines are those of the packed engine.
- **Int8**: `--quantization int8` for either half.

All but the Qwen-VL lines are served by the general path, which runs transformers' own classes and the checkpoint's own
processor, and no code of a repository. So are others that transformers has an image-text-to-text class for, if it
takes image features computed elsewhere (`mm_encoder_outputs`). At start the prompts made here are compared with those
that the checkpoint's processor makes, the language half's steps with the class's own forward, and the rows of an image
with the tokens written for it; what differs is not served. The packed engine runs a class whose layers attend over
keys and values, or keep a state that is known here: short convolutions and gated delta rules. What it can't run, or
computes otherwise, the plain engine serves: attention sinks, keys of another size than values, layers of several
sizes, state of other kinds, a Q-Former that reads the question (InstructBLIP), an encoder and a decoder (Flan-T5).
`--engine packed` refuses such a model; `--engine plain` takes the plain engine for any class of the general path.
Which engine it is and why is said at start, by `lookonce doctor`, `plan` and `up`, and in `/v1/models`. So is what is
refused by all engines. In the packed engine the layers of a class may lie on several devices (`--device-map`); its
vision half encodes one image at a time. An image's `max_pixels` bounds what its processor is given. Where an image has
other rows in a prompt with several, as LLaVA-OneVision's has, one embedding holds both forms. Experts that files hold
in parts are joined when they are read.

A prefix of a model with recurrent layers (Qwen3.5, LFM3-VL) is its KV and their state at its end, which every question
forks. It is counted, evicted and erased with the KV. A prefix is reused as a whole: text that goes on otherwise within
it is computed from the image's end. A finished answer's state is kept for the next turn where its KV is at least a
quarter as large: from about 400 tokens on with Qwen3.5 9B, from 32 with LFM3-VL. The next turn behind a shorter one is
computed from the last image's end. The layers of such a model lie on one device.

Who sees whom is read off the class: the sliding windows of layers, image tokens that see each other both ways
(Gemma 3), prompts that see themselves (PaliGemma). Scores may have a soft cap (PaliGemma 2). The context is the
model's own, however short its windows are, and KV is kept for all of it. Tokens that see each other are prefilled in
one step, even if they are more than a step may have. A prompt of PaliGemma shares its image's embedding with others,
and its KV with none but the very same prompt. Models with such rules attend by torch's operations, without compiled
kernels.

**InstructBLIP**: what is stored of an image is its tower's rows, which no question changes; the Q-Former runs in the
language service, once for each question. The other way, a key that includes the question, would encode the image
again for each of them: the tower has about five times the Q-Former's weights (ViT-g and 188 million,
arXiv:2301.12597).

"""
TRIED = """\
## Every class of transformers, tried

`python -m tests.families sweep` makes a random checkpoint of each, as far as it knows how to, and holds prompts of one
image, of two, and of two turns to the unsplit model: tokens equal, log-probabilities within 2e-4.

"""
PUBLISHED = """\
## Embedding models

A vector is made of a text or an image by a model over the same towers, from the same cached embedding. GME-Qwen2-VL and
others that sentence-transformers lays out (`modules.json`) pool one row of a chat prompt; ColQwen2 and ColQwen2.5, as
transformers or colpali-engine saves them, make a vector of each token. `--task embed` takes any checkpoint of a Qwen
line for a pooled one. Such a service answers `/v1/embeddings`, `/v1/rerank` and `/v1/images/search`. It writes no
text.

## As they are published

- **Quantised weights** are dequantised as they are read, matrix by matrix: GPTQ (2, 3, 4 and 8 bits, both forms of
  zeros, `desc_act`), AWQ (`gemm`, `gemv`, `gemv_fast`), AutoRound (in GPTQ's and AWQ's layouts), compressed-tensors
  (packed integers, int8, FP8, NVFP4, MXFP4, MXFP8), ModelOpt (FP8, NVFP4), FP8 (blocks, rows or one scale),
  bitsandbytes (NF4, FP4, int8). Memory is that of plain weights; `lookonce doctor` and `plan` say both sizes. A matrix
  is what its tensors are: modules that a config leaves alone are read as they are. A vision half may be quantised too:
  its fingerprint is of what is stored and how it is read. Other methods are refused by name.
- **LoRA adapters**: `--adapter` with a directory or a hub id, for both services or `lookonce up`, merged at start:
  rsLoRA, DoRA, ranks and factors by pattern, embeddings and heads, `modules_to_save`, biases. One that was trained on
  the vision half makes other embeddings; all others share the base model's. One on an embedding or on the head that is
  tied to it unties them, as PEFT's own forward does. Other methods are refused by name.
- **generation_config.json**: its temperature, top_p, top_k, min_p and repetition_penalty are what a request is given
  that leaves them out, as in vLLM; `/v1/models` shows them. `--generation-config none` decodes greedily instead.
- **Long context**: YaRN and linear scaling of the Qwen lines' positions (`rope_scaling`). YaRN's context is the trained
  one times its factor. Dynamic scaling is refused.
"""


def declared() -> Iterator[tuple[str, Served]]:
    """Every family, and the file below tests/ that declares it."""
    yield "families/models_page.py", QWEN2_VL
    for path in sorted(FOLDER.glob("test_*.py")):
        served = getattr(import_module(f"tests.families.{path.stem}"), "SERVED", ())
        for one in (served,) if isinstance(served, Served) else served:
            yield f"families/{path.name}", one


def tried() -> str:
    """What became of every class that the table doesn't name."""
    named = {one.model_type for _, one in declared()}
    found = [each for each in json.loads((FOLDER / "swept.json").read_text()) if each["model_type"] not in named]
    served = [f"`{each['model_type']}`{_brief(each['said'])}" for each in found if each["what"] == "served"]
    text = textwrap.fill(f"Served without being named: {', '.join(served)}.", 120, break_on_hyphens=False) + "\n\n"
    reasons: dict[str, list[str]] = {}
    for each in found:
        if each["what"] == "refused":
            reasons.setdefault(_reason(each["said"]), []).append(f"`{each['model_type']}`")
    for reason, names in sorted(reasons.items()):
        line = f"- Refused, {reason}: {', '.join(names)}."
        text += textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False) + "\n"
    unmade = [f"`{each['model_type']}`" for each in found if each["what"] == "not made"]
    line = f"- Not tried, for want of a package or of a way to make one: {', '.join(unmade)}."
    return text + textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False) + "\n\n"


def _brief(said: str) -> str:
    return " (one image a prompt)" if said else ""


def _reason(said: str) -> str:
    """What is said of the class, or else the first thing that is said."""
    first = next((each for each in said.split(" | ") if _CLASS in each), said.split(" | ")[0])
    return first.rpartition(_CLASS)[2].partition(";")[0].partition(": model.")[0].removeprefix("PATH: ")


def page() -> str:
    """The page."""
    rows = [["models", "`model_type`", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
    for _, one in declared():
        said = [{No: "no", Plain: "plain"}.get(type(cell), "yes") for cell in one.cells]
        rows.append([one.models, f"`{one.model_type}`", *said])
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows) + FOOT + TRIED + tried() + PUBLISHED
