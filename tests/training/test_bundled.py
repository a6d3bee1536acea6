"""The bundled checkpoint and samples: what plain transformers makes of them, and that the lean model says the same."""

import json
from pathlib import Path

import pytest
from PIL import Image

import lookonce
from training.shapes import answerers, questions, scenes

DATA = Path(lookonce.__file__).parent / "data"
CHECKPOINT, SAMPLES = DATA / "shapes", DATA / "samples"


@pytest.fixture(scope="module")
def plain():
    return answerers.Transformers(CHECKPOINT)


@pytest.fixture(scope="module")
def lean():
    return answerers.Lean(CHECKPOINT)


@pytest.fixture(scope="module")
def samples():
    return json.loads((SAMPLES / "samples.json").read_text())


def test_every_tensor_is_loaded_and_none_left_over():
    from transformers import Qwen2VLForConditionalGeneration

    _, report = Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_it_stays_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 12e6


def test_plain_transformers_answers_the_samples_rightly(plain, samples):
    for sample in samples[:4]:
        data = (SAMPLES / sample["file"]).read_bytes()
        for question in sample["questions"]:
            asked = questions.Question(question["type"], question["question"], question["answer"])
            assert asked.accepts(plain(data, [asked.text])[0].text), (sample["file"], question)


def test_the_lean_model_says_what_transformers_says(plain, lean, samples):
    for sample in samples[4:7]:
        data = (SAMPLES / sample["file"]).read_bytes()
        asked = [question["question"] for question in sample["questions"]]
        assert [answer.text for answer in lean(data, asked)] == [answer.text for answer in plain(data, asked)]


def test_one_forward_pass_tells_what_would_be_said(plain, samples):
    data = (SAMPLES / samples[3]["file"]).read_bytes()
    asked = [question["question"] for question in samples[3]["questions"]]
    said = [answer.text for answer in plain(data, asked)]
    assert all(plain.would_say(data, asked, said))
    for wrong in ([f"{text} and" for text in said], [text[:-1] for text in said], ["yellow"] * len(said)):
        assert plain.would_say(data, asked, wrong) == [text == other for text, other in zip(said, wrong, strict=True)]


def test_samples_are_what_samples_json_says(samples):
    assert len(samples) == 12
    for sample in samples:
        with Image.open(SAMPLES / sample["file"]) as image:
            assert image.size == (sample["width"], sample["height"])
        assert len(sample["questions"]) == 8
        for shape in sample["shapes"]:
            assert shape["kind"] in scenes.KINDS and shape["colour"] in scenes.COLOURS
            x0, y0, x1, y1 = shape["box"]
            assert -5 <= x0 < x1 <= sample["width"] + 5 and -5 <= y0 < y1 <= sample["height"] + 5


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "HOW MNAY SHAPSE??"}],
        [{"role": "user", "content": "Combien de cercles rouges, \u7ea2\u8272\uff1f"}],
        [{"role": "system", "content": ""}, {"role": "user", "content": "x" * 500}],
    ],
)
def test_odd_text_gets_some_answer(plain, samples, messages):
    assert plain.converse(messages).strip()
    data = (SAMPLES / samples[0]["file"]).read_bytes()
    last = messages[-1] | {"content": [data, messages[-1]["content"]]}
    assert plain.converse([*messages[:-1], last]).strip()


def test_no_image_is_said(plain):
    assert plain.converse([{"role": "user", "content": "How many stars are there?"}]) == "There is no image."
