"""The blocking client against a real system: images, questions, streams, scores, erasure."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest

import lookonce
from lookonce.client import Answer, BadRequestError, Image, NotFoundError, Question
from tests.processes import ROOT
from tests.system.cluster import encoded


def test_importing_lookonce_brings_no_client_along():
    code = (
        "import sys, lookonce, json; heavy = ('httpx2', 'tenacity', 'rich', 'torch', 'PIL', 'grpc')\n"
        "before = [m for m in heavy if m in sys.modules]; lookonce.Client; lookonce.AsyncClient\n"
        "print(json.dumps([before, [m for m in heavy if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before == []
    assert set(after) <= {"httpx2", "tenacity", "rich"}
    with pytest.raises(AttributeError, match="Clientele"):
        lookonce.Clientele  # noqa: B018


def test_every_kind_of_image_gives_the_same_image(client, file, new_image):
    data = file.read_bytes()
    image = client.image(file)
    assert isinstance(image, Image)
    assert (image.width, image.height, image.bytes, image.status) == (84, 56, len(data), "ready")
    assert image.tokens == 6
    assert image.cached is False
    assert image.encode_ms > 0
    assert image.expires_at > image.created_at
    data_url = "data:image/png;base64," + base64.b64encode(data).decode()
    for same in (str(file), data, bytearray(data), memoryview(data), data_url):
        again = client.image(same)
        assert (again.id, again.cached) == (image.id, True)
    for identifier in (image.id, f"lookonce:{image.id}"):
        found = client.image(identifier)
        assert (found.id, found.cached) == (image.id, None)


def test_images_of_pillow_in_any_mode(client, new_image):
    drawn = new_image(112, 56)
    sizes = [
        (image.width, image.height) for image in (client.image(drawn.convert(mode)) for mode in ("RGB", "CMYK", "F"))
    ]
    assert sizes == [(112, 56)] * 3
    assert client.image(drawn).id == client.image(encoded(drawn)).id


def test_an_answer_says_what_it_reused(client, new_image):
    image = client.image(new_image())
    first = image.ask("What is this?", max_tokens=6)
    second = image.ask("And what is that?", max_tokens=6)
    assert isinstance(first, Answer)
    assert str(first) == first.text
    assert first.ok and first.finish_reason in ("stop", "length")
    assert (first.receipt.embedding, first.receipt.prefix) == ("hit", "miss")
    assert (second.receipt.embedding, second.receipt.prefix) == ("hit", "hit")
    assert second.usage.cached_tokens == second.receipt.cached_tokens >= image.tokens
    assert second.receipt.cached_tokens + second.receipt.prefill_tokens == second.usage.prompt_tokens
    assert second.receipt.ttft_ms > 0
    assert second.usage.total_tokens == second.usage.prompt_tokens + second.usage.completion_tokens
    assert second.usage.image_tokens == image.tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "seed": 7, "top_p": 0.9},
        {"system": "Be brief.", "detail": "low"},
        {"temperature": None, "stop": "e"},
    ],
)
def test_a_streamed_answer_is_the_same_answer(client, new_image, options):
    image = client.image(new_image(140, 84))
    whole = image.ask("Describe the picture.", max_tokens=24, **options)
    stream = image.ask("Describe the picture.", stream=True, max_tokens=24, **options)
    pieces = list(stream)
    assert "".join(pieces) == stream.text == whole.text
    answer = stream.answer()
    assert (answer.text, answer.finish_reason) == (whole.text, whole.finish_reason)
    assert answer.usage.completion_tokens == whole.usage.completion_tokens
    assert answer.usage.prompt_tokens == whole.usage.prompt_tokens
    assert (answer.receipt.embedding, answer.receipt.prefix) == ("hit", "hit")


def test_a_stream_can_be_left_before_it_begins_or_half_way(client, new_image):
    image = client.image(new_image())
    image.ask("Unread", stream=True, max_tokens=50).close()
    with image.ask("Half", stream=True, max_tokens=50, temperature=1.5, seed=1) as stream:
        first = next(iter(stream))
    assert stream.text.startswith(first)
    assert list(stream) == []
    assert image.ask("Still fine?", max_tokens=2).ok  # both connections went back or away


def test_many_answers_keep_their_order_over_several_requests(client, new_image, monkeypatch):
    monkeypatch.setattr("lookonce.client.calls.MAX_QUESTIONS", 16)
    image = client.image(new_image())
    questions = [f"Question {number}?" for number in range(40)]
    reports: list[tuple[int, int]] = []
    answers = image.ask_many(questions, progress=lambda done, total: reports.append((done, total)), max_tokens=4)
    assert [answer.id for answer in answers] == [str(number) for number in range(40)]
    assert reports == [(done, 40) for done in range(1, 41)]
    for number in (0, 17, 39):
        assert answers[number].text == image.ask(questions[number], max_tokens=4).text


def test_a_bar_shows_progress_on_stderr(client, new_image, capsys):
    answers = client.image(new_image()).ask_many(["a?", "b?"], progress=True, max_tokens=1)
    shown = capsys.readouterr()
    assert len(answers) == 2
    assert "2/2" in shown.err
    assert shown.out == ""


def test_no_questions_no_request(client, new_image):
    assert client.image(new_image()).ask_many([]) == []


def test_questions_with_own_parameters_ids_and_failures(client, new_image):
    image = client.image(new_image())
    mixed = [
        "Plain?",
        Question("Short?", id="1", sampling={"max_tokens": 1}),
        Question("Red?", id="red", choices=["yes", "no"]),
        Question("Too long? " + "word " * 20_000, id="long"),
    ]
    plain, short, red, long = image.ask_many(mixed, max_tokens=5)
    assert [answer.id for answer in (plain, short, red, long)] == ["0", "1", "red", "long"]
    assert plain.usage.completion_tokens <= 5
    assert short.usage.completion_tokens == 1
    assert sum(red.choices.values()) == pytest.approx(1)
    assert red.text == max(red.choices, key=red.choices.get)
    assert isinstance(long.error, lookonce.client.ContextLengthError)
    assert not long.ok
    assert long.text == ""


def test_answers_as_they_complete(client, new_image):
    image = client.image(new_image())
    arrived = {answer.id: answer.text for answer in image.ask_as_completed(["a?", "b?", "c?"], max_tokens=3)}
    assert arrived == {str(place): image.ask(f"{name}?", max_tokens=3).text for place, name in enumerate("abc")}


def test_scores(client, new_image):
    image = client.image(new_image())
    scores = image.score("Is it red?", ["yes", "no", "perhaps"])
    assert list(scores) == ["yes", "no", "perhaps"]
    assert sum(scores.values()) == pytest.approx(1)
    many = image.score_many(["Is it red?", "Is it blue?"], ["yes", "no", "perhaps"])
    assert many[0] == pytest.approx(scores, rel=1e-4)
    assert many[1] != pytest.approx(scores, rel=1e-9)


def test_chat_takes_strings_images_and_parts(client, new_image):
    left, right = client.image(new_image()), client.image(new_image())
    part = {"type": "image_url", "image_url": {"url": f"lookonce:{right.id}"}}
    both = [{"role": "user", "content": [left, part, "What differs?"]}]
    answer = client.chat(both, max_tokens=5)
    assert answer.usage.image_tokens == left.tokens + right.tokens
    assert "".join(client.chat(both, stream=True, max_tokens=5)) == answer.text
    assert client.chat("Hello", max_tokens=3).receipt.embedding is None


def test_an_image_is_looked_at_within_its_bounds(client, new_image):
    drawn = new_image(140, 140)
    small, large = client.image(drawn, max_pixels=9 * 784), client.image(drawn, min_pixels=64 * 784)
    own = client.image(small.id)
    assert small.id == large.id and (small.tokens, own.ask("?", max_tokens=1).usage.image_tokens, large.tokens) == (
        9,
        25,
        64,
    )
    url = client.image("data:image/png;base64," + base64.b64encode(encoded(drawn)).decode(), max_pixels=9 * 784)
    assert (url.tokens, url.cached) == (9, True)
    for image, size in ((small, 9), (large, 64)):
        answers = [image.ask("?", max_tokens=1), image.ask("?", max_tokens=1, stream=True).answer()]
        answers += image.ask_many(["?", Question("?", choices=["a", "b"])], max_tokens=1)
        answers.append(client.chat([{"role": "user", "content": [image, "?"]}], max_tokens=1))
        assert [answer.usage.image_tokens for answer in answers] == [size] * len(answers)
    assert large.ask("?", max_tokens=1, min_pixels=36 * 784).usage.image_tokens == 36
    bounded = client.chat([{"role": "user", "content": [own, "?"]}], max_pixels=9 * 784, max_tokens=1)
    assert bounded.usage.image_tokens == 9
    with pytest.raises(BadRequestError, match="'min_pixels' is 9000, above 'max_pixels'"):
        small.ask("?", min_pixels=9000)


def test_models(client, system):
    [model] = client.models()
    assert model.id == system.model
    assert client.chat("Hello", model=model.id, max_tokens=1).ok


def test_an_erased_image_is_gone(client, new_image):
    image = client.image(new_image())
    assert image.refresh() is image
    assert image.cached is None
    erased = image.delete()
    assert (erased.id, erased.complete) == (image.id, True)
    for use in (image.refresh, image.delete, lambda: image.ask("?"), lambda: client.image(image.id)):
        with pytest.raises(NotFoundError):
            use()


def test_settings_come_from_the_environment(url, monkeypatch):
    monkeypatch.setenv("LOOKONCE_URL", url + "/")
    with lookonce.Client() as client:
        assert len(client.models()) == 1
