"""The checkpoint's tokenizer: byte-level BPE over our own words, with Qwen2-VL's special tokens and chat template.

Any text is accepted: what the merges do not know falls back to bytes.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from . import questions, scenes

VOCAB = 768  # at most; the embedding table has as many rows
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
SPLIT = (  # Qwen2's pre-tokenisation
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT_SYSTEM = "You are a helpful assistant."
NO_IMAGE = "There is no image."
OFF_TOPIC = "I only answer questions about shapes in a picture."
SYSTEMS = (
    "Answer briefly.", "You answer questions about pictures.", "You are a careful inspector of images.",
    "Be short and exact.", "You are a vision model. Reply with one word where you can.", "You are a friendly robot.",
    "Look at the image and answer the question of the user.", "You check pictures against a policy.", "You are Qwen.",
    "You see shapes and colours. Answer in English.", "Please help the user.", "Reply in as few words as possible.",
)  # fmt: skip
CHATTER = (
    "Hello!", "Hi", "Hello, how are you?", "Who are you?", "What can you do?", "Thank you.", "Tell me a joke.",
    "Good morning",
    "What is the weather today?", "Write a poem.", "Thanks!", "What is your name?", "Please help me.",
    "Can you help me?",
)  # fmt: skip
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(count: int = 6000) -> list[str]:
    """Lines to learn merges from: questions, answers, and the words around them."""
    rng = np.random.default_rng(3)
    lines = [*SYSTEMS, *CHATTER, DEFAULT_SYSTEM, NO_IMAGE, OFF_TOPIC, "system", "user", "assistant"] * 40
    for _ in range(count):
        shapes = scenes.layout(rng, int(rng.integers(1, 7)), 196, 196, (7, 7), "any")
        for kind in (*questions.TYPES, "missing"):
            question = questions.ask(kind, shapes, (196, 196), rng)
            if question:
                lines += [question.text, question.answer]
    lines += [line.lower() for line in lines[:4000]]
    return lines


def build(lines: list[str]) -> Tokenizer:
    """Learn merges from lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=3,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


class Words:
    """Cached encoding of text pieces; special tokens in the text count as such."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
        self.encode = lru_cache(maxsize=400_000)(self._encode)
        self.colours = self._names({colour: (colour,) for colour in scenes.COLOURS})  # token id to what it names
        self.kinds = self._names({kind: (kind, questions.PLURAL[kind]) for kind in scenes.KINDS})

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _names(self, names: dict[str, tuple[str, ...]]) -> dict[int, str]:
        found = {}
        for name, forms in names.items():
            for form in (variant for word in forms for variant in (word, f" {word}", word.capitalize())):
                ids = self._encode(form)
                if len(ids) == 1:
                    found[ids[0]] = name
        return found

    def decode(self, ids) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def load(path: Path) -> Words:
    """The tokenizer kept in `path` (tokenizer.json), built and kept there when missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        build(corpus()).save(str(path))
    return Words(Tokenizer.from_file(str(path)))
