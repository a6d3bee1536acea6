"""Every answer through REST is the unsplit model's answer."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.images import odd_files, photograph, save
from tests.system.cluster import System, data_url, image_part, text_part
from tests.unsplit import Unsplit
from vision_service.images import Decoder, ImageLimits

KINDS = {
    "nested-untied": {"layout": "nested", "tied": False, "shards": 3},
    "published-untied-wide": {"layout": "published", "tied": False, "layers": 3, "seed": 5},
}


@pytest.fixture(scope="module", params=["shared", *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS)])
def pair(request, tmp_path_factory):
    if request.param == "shared":
        yield request.getfixturevalue("single"), Unsplit(request.getfixturevalue("model"))
        return
    folder = tmp_path_factory.mktemp(request.param)
    model = make_random_checkpoint(folder / "model", max_pixels=200 * 28 * 28, **KINDS[request.param])
    with System(model, folder) as system:
        yield system, Unsplit(model)


def canonical(data):
    """The image the model is to see."""
    return Decoder(ImageLimits()).decode(data)


def test_one_image_of_every_kind(pair):
    system, unsplit = pair
    for name, data in odd_files().items():
        image = system.upload(data)["id"]
        answers = system.ask(image, ["What is this?", "How many are there?"], max_tokens=8, temperature=0)
        for answer, question in zip(answers, ["What is this?", "How many are there?"], strict=True):
            assert answer["text"] == unsplit.answer([("user", [canonical(data), question])], 8), name


def test_three_images_over_several_turns(pair):
    system, unsplit = pair
    files = [save(photograph(name, size), "PNG") for name, size in (("coffee", (90, 120)), ("chelsea", (200, 60)))]
    files.append(odd_files()["29x31"])
    images = [canonical(data) for data in files]
    parts = [image_part(data_url(data)) for data in files]
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [parts[0], text_part("What is in the first?"), parts[1]]},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": [text_part("And here?"), parts[2]]},
    ]
    turns = [
        ("system", ["Answer in one word."]),
        ("user", [images[0], "What is in the first?", images[1]]),
        ("assistant", ["A cup."]),
        ("user", ["And here?", images[2]]),
    ]
    for _ in range(2):  # the second time from every cache
        reply = system.chat(messages, max_tokens=12)
        assert reply["choices"][0]["message"]["content"] == unsplit.answer(turns, 12)


def test_no_image_at_all(pair):
    system, unsplit = pair
    reply = system.chat([{"role": "user", "content": "Say something."}], max_tokens=12)
    assert reply["choices"][0]["message"]["content"] == unsplit.answer([("user", ["Say something."])], 12)


def test_the_canonical_image_is_what_people_see():
    """So that the reference above is not fed an image that only we believe in."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown, it is 2 wide and 3 high
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(buffer, "JPEG", exif=exif)
    assert canonical(buffer.getvalue()).size == (40, 60)
    assert canonical(save(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "PNG")).getpixel((5, 5)) == (255, 255, 255)
