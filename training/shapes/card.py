"""Writes the checkpoint's README.md, the model card, from what evaluate.py measured. Claims only what reached 90 %."""

import argparse
import json
from pathlib import Path

from safetensors import safe_open

from . import questions, scenes
from .evaluate import NAMED, table

CLAIM = 0.9
WHAT = {
    "colour": "colour of a shape", "kind": "shape of a colour", "count_all": "how many in all",
    "count_kind": "how many of a shape", "count_colour": "how many of a colour",
    "count_pair": "how many of a colour and shape",
    "exists": "is there ...", "policy": "does this image contain ...? yes or no", "where": "where is the ...",
    "relation": "left of, right of, above, below", "extreme": "the biggest, the smallest",
    "describe": "describe the image (right only if every shape is listed, and nothing else)",
}  # fmt: skip


def parameters(checkpoint: Path) -> tuple[int, int]:
    """How many parameters in all, and in the vision tower."""
    counts = {}
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, a safetensors handle is no dict
            size = 1
            for side in tensors.get_slice(name).get_shape():
                size *= side
            counts[name] = size
    return sum(counts.values()), sum(size for name, size in counts.items() if name.startswith("visual."))


def reliability(fresh: dict) -> str:
    lines = ["| P(yes) from | questions | mean P(yes) | truly yes |", "|---|---|---|---|"]
    lines += [
        f"| {row['from']} | {row['count']} | {row['mean_p_yes']:.3f} | {row['truly_yes']:.3f} |"
        for row in fresh["policy_reliability"]
    ]
    return "\n".join(lines)


def card(checkpoint: Path, evaluation: dict) -> str:
    """The model card's text."""
    config = json.loads((checkpoint / "config.json").read_text())
    vision, fresh = config["vision_config"], evaluation["fresh"]
    everything, tower = parameters(checkpoint)
    size = (checkpoint / "model.safetensors").stat().st_size / 1e6
    good = [kind for kind in questions.TYPES if fresh["accuracy"].get(kind, 0) >= CLAIM]
    bad = [kind for kind in questions.TYPES if kind not in good]
    claimed = "\n".join(f'- {WHAT[k]}: {100 * fresh["accuracy"][k]:.1f} %, e.g. "{_example(k)}"' for k in good)
    unclaimed = ", ".join(f"{WHAT[k]} ({100 * fresh['accuracy'].get(k, 0):.0f} %)" for k in bad) or "none"
    asked = max(fresh["asked"].values())
    held_out = " and ".join(f"{colour} {kind}" for colour, kind in sorted(scenes.HELD_OUT))
    forms = evaluation.get("formats", {})
    scenes_asked = ", ".join(f"{name} {max(s['asked'].values())}" for name, s in evaluation.items() if name in NAMED)
    conversation = "; ".join(f"{name} {100 * value:.0f} %" for name, value in forms.items())
    if forms:
        conversation = f"By form of the conversation ({evaluation['conversations']} scenes): {conversation}."
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
model_type: qwen2_vl
---

# shapes: a small Qwen2-VL that sees coloured shapes

{everything / 1e6:.2f} M parameters ({tower / 1e6:.2f} M of them `visual.*`),
{config["torch_dtype"]}, {size:.1f} MB, trained from nothing on drawn scenes. It exists so that a system that serves
Qwen2-VL can be tried and tested on true answers without a large download. It knows nothing but what is listed here.

## What it answers

Measured on {asked} freshly drawn scenes, greedy decoding in float32 from this very file{_through(evaluation)}.
Pictures and phrasings come from the generator that it was trained with, under other seeds:

{claimed}

Ask about {len(scenes.KINDS)} shapes ({", ".join(scenes.KINDS)}) in {len(scenes.COLOURS)} colours
({", ".join(scenes.COLOURS)}), one to six in a picture.

P(yes) against P(no) of the policy questions separates the two with ROC AUC {fresh["policy_auc"]:.4f}:

{reliability(fresh)}

## What it does not

- Trained on, but not reliable, so not claimed: {unclaimed}.
- Other objects, text, photographs of things, several pictures at once, languages other than English.
- More than six shapes, shapes smaller than about a sixth of the picture's shorter side, hollow shapes, rotation
  beyond 20 degrees.
- Without a picture it says "There is no image."; to small talk, that it only answers questions about shapes.

## All figures (per cent right)

{table((name, summary) for name, summary in evaluation.items() if name in NAMED)}

Scenes asked about: {scenes_asked}.
fresh: PNG of 64 to 512 pixels, one question of each type a scene. held-out pairs: questions about a {held_out}, never
drawn nor asked about in training (where its figures are low, the model has not learned to combine what it knows apart).
jpeg: quality 40 to 90. photograph: JPEG of 1200 to 2000 pixels a side. icon: 48 to 64 pixels, one to three shapes.
Shapes named in descriptions, item F1 on fresh scenes: {fresh["describe_item_f1"]:.4f}.
{conversation}

## Architecture

Qwen2VLForConditionalGeneration. Vision: width {vision["embed_dim"]}, {vision["depth"]} blocks,
{vision["num_heads"]} heads, patch 14, merge 2. Language: width
{config["hidden_size"]}, {config["num_hidden_layers"]} layers, {config["num_attention_heads"]} heads,
{config["num_key_value_heads"]} key-value heads, feed-forward {config["intermediate_size"]}, M-RoPE sections
{config["rope_scaling"]["mrope_section"]}, theta {config["rope_theta"]:.0f}. Byte-level BPE of at most
{config["vocab_size"]} entries with Qwen2-VL's special tokens and ChatML template. Every
picture is scaled to 36 to 50 image tokens (`preprocessor_config.json`).

    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2VLForConditionalGeneration.from_pretrained(path)

## Data and training

Scenes: antialiased shapes on plain, graded and noisy grounds, mild rotation and overlap, sometimes outlines, shading,
blur, JPEG. Recipe, code and seeds: `training/shapes` in the source repository. CPU only, some three hours on two busy
cores that other work shared.
"""


def _through(evaluation: dict) -> str:
    """How the checkpoint was asked, and how far its answers were plain transformers'."""
    system = evaluation["system"]
    if "unsplit" not in system:
        return f", through {system['asked']}"
    both = system["unsplit"]
    same = f"{both['asked'] - both['different']:,} of {both['asked']:,}"
    return f", through a running gateway;\n{same} answers, on all pictures below, are plain transformers' own"


def _example(kind: str) -> str:
    words = {"k": "star", "c": "red", "ks": "stars", "a": "a red cross", "x": "red crosses", "o": "star", "p": "circle"}
    return questions.PHRASES[kind][0].format(r="left of", e="biggest", **words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON that evaluate.py wrote")
    args = parser.parse_args()
    text = card(args.checkpoint, json.loads(args.evaluation.read_text()))
    (args.checkpoint / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
