"""What people do in the playground, done in real Chromium; what the page shows is compared with the API's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.system.cluster import GatewayProcess, System, image_part, text_part

pytestmark = pytest.mark.browser
KEY = "a-key-of-tests-0123456789"
GROWTH = """() => {
  window.lengths = [];
  const list = document.getElementById("answers");
  const look = () => window.lengths.push(list.querySelector(".text")?.textContent.length ?? 0);
  new MutationObserver(look).observe(list, { childList: true, subtree: true, characterData: true });
}"""
DROP = """async ([name, bytes, kind]) => {
  const carried = new DataTransfer();
  carried.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { ...options, clipboardData: carried })
    : new DragEvent(kind, { ...options, dataTransfer: carried });
  document.body.dispatchEvent(event);
}"""
CONTRAST = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.matches("kbd, noscript, option, .hidden-visually, .skip")) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color).slice(0, 3)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${node.tagName}.${node.className} "${node.textContent.slice(0, 30)}" ${ratio}`);
  }
  return found;
}"""


def load(page: Page, image_path: Path) -> str:
    """Chooses the file; the id that the gateway gave it."""
    with page.expect_response(lambda reply: reply.url.endswith("/v1/images")) as reply:
        page.get_by_label("Choose an image", exact=True).set_input_files(image_path)
    expect(page.locator("#facts")).to_be_visible()
    return reply.value.json()["id"]


def ask(page: Page, question: str) -> Locator:
    """Asks, and waits for the whole answer."""
    page.get_by_role("textbox", name="Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    return whole(page.locator(".answer").first)


def whole(card: Locator) -> Locator:
    expect(card.locator(".badges")).to_be_visible()
    expect(card).not_to_have_class(re.compile("waiting|writing"))
    return card


def api_text(system: System, image: str, question: str, max_tokens: int = 128) -> str:
    content: list[Any] = [image_part(f"lookonce:{image}"), text_part(question)]
    reply = system.chat([{"role": "user", "content": content}], max_tokens=max_tokens)
    return reply["choices"][0]["message"]["content"]


def same_text(card: Locator, text: str) -> None:
    assert card.locator(".text").evaluate("node => node.textContent") == text


def test_an_answer_streams_and_shows_what_it_reused(page, image_path, system):
    expect(page.locator("#model")).to_have_text(system.model)
    expect(page.locator("#health")).to_have_class("dot ready")
    image = load(page, image_path)
    expect(page.locator("#fact-size")).to_have_text("112 × 84")
    expect(page.locator("#fact-tokens")).to_have_text("12")
    expect(page.locator("#fact-encode")).to_contain_text("ms")
    page.evaluate(GROWTH)
    card = ask(page, "What is this?")
    same_text(card, api_text(system, image, "What is this?"))
    lengths = page.evaluate("window.lengths")
    assert len({length for length in lengths if length}) > 2  # it grew before one's eyes
    expect(card.locator(".badge.hit").first).to_have_text("embedding hit")
    expect(card.locator(".badge").nth(1)).to_have_text(re.compile("prefix (hit|miss)"))
    expect(card.locator(".timing .prefill")).to_be_attached()
    expect(card.locator(".timing .decode")).to_be_attached()
    expect(card.locator(".timing .saved")).to_be_attached()  # the encoding, paid for at the upload
    expect(card.locator(".savings")).to_contain_text("Reused the encoding (")
    expect(card.locator(".legend")).to_contain_text("saved ≈")
    assert system.http.get(f"/v1/images/{image}").status_code == 200


def test_the_newest_answer_is_on_top_and_options_are_sent(page, image_path, system):
    image = load(page, image_path)
    page.get_by_text("Options").click()
    page.get_by_label("Longest answer (tokens)").fill("3")
    ask(page, "First?")
    second = ask(page, "Second?")
    expect(second.locator(".badge").nth(1)).to_have_text("prefix hit")
    expect(second.locator(".savings")).to_have_text(re.compile(r"and \d+ of \d+ prompt tokens\.$"))
    expect(second.locator(".asked")).to_have_text("Second?")
    same_text(second, api_text(system, image, "Second?", max_tokens=3))
    expect(page.locator(".answer")).to_have_count(2)


def test_ten_questions_at_once(page, image_path, system):
    image = load(page, image_path)
    page.get_by_role("tab", name="Ask many").click()
    box = page.get_by_label("Questions, one on each line")
    questions = box.input_value().split("\n")
    assert len(questions) == len(set(questions)) == 10
    page.get_by_text("Options").click()
    page.get_by_label("Longest answer (tokens)").fill("8")
    page.get_by_role("button", name="Ask all").click()
    expect(page.locator("#tally")).to_have_text(re.compile(r"10 of 10 in \d+\.\d\d s"))
    cards = page.locator(".answer")
    expect(cards).to_have_count(10)
    for number, question in enumerate(questions):
        expect(cards.nth(number).locator(".asked")).to_have_text(question)
        expect(cards.nth(number).locator(".badge").first).to_have_text("embedding hit")
        expect(cards.nth(number).locator(".timing")).to_be_visible()
    for number in (0, 9):
        same_text(cards.nth(number), api_text(system, image, questions[number], max_tokens=8))


GROUNDED = [
    (
        "qwen2_vl",
        "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(100,200),(600,1000)<|box_end|>, and "
        "<|object_ref_start|>cups<|object_ref_end|><|box_start|>(0,0),(250,500)<|box_end|>"
        "<|box_start|>(5,6)<|box_end|><|box_start|>(900,900),(500,750)<|box_end|>",
        [("a cat", 0.1, 0.2, 0.5, 0.8), ("cups", 0, 0, 0.25, 0.5), ("cups", 0.5, 0.75, 0.4, 0.15)],
    ),
    (
        "qwen2_5_vl",  # 4 by 3 tokens of 28 pixels
        '```json\n[{"bbox_2d": [28, 21, 84, 63], "label": "the \\"sign\\""}, {"bbox_2d": [0, 0, 9',
        [('the "sign"', 0.25, 0.25, 0.5, 0.5)],
    ),
    ("qwen3_vl", '{"label": "sign", "bbox_2d": [250, 500, 2000, 750]}', [("sign", 0.25, 0.5, 0.75, 0.25)]),
    ("qwen2_vl", "The box <|box_start|> is (1,2),(3,4) and <b>bold</b>.", []),
]


@pytest.mark.parametrize(("family", "text", "boxes"), GROUNDED)
def test_boxes_of_an_answer_are_drawn_over_the_image(page, image_path, family, text, boxes):
    asked: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        asked.append(route.request.post_data_json)
        receipt = {"embedding": "hit", "prefix": "hit", "encode_ms": 0, "prefill_tokens": 1, "cached_tokens": 1}
        receipt |= {"queue_ms": 0, "ttft_ms": 1, "model": "a fine-tune", "fingerprint": ""}
        usage = {"prompt_tokens": 2, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
        chunks = [{"choices": [{"delta": {"content": text}}]}, {"choices": [], "receipt": receipt, "usage": usage}]
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        route.fulfill(content_type="text/event-stream", body="".join(lines) + "data: [DONE]\n\n")

    card = {"id": "a fine-tune", "family": family}
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [card]}))
    page.reload()
    expect(page.locator("#model")).to_have_text("a fine-tune")
    load(page, image_path)
    layer = page.locator("#boxes")
    page.get_by_text("Options").click()
    page.get_by_label("Boxes").check()
    page.route("**/v1/chat/completions", answer)
    card = ask(page, "Where?")
    assert [body["skip_special_tokens"] for body in asked] == [False]
    same_text(card, text)
    expect(layer.locator("text")).to_have_text([label for label, *_ in boxes])
    frame = page.locator("#preview").bounding_box()
    for number, (_, *shares) in enumerate(boxes):
        left, top, width, height = shares
        drawn = layer.locator("rect").nth(number).bounding_box()
        wanted = {"x": frame["x"] + left * frame["width"], "y": frame["y"] + top * frame["height"]}
        wanted |= {"width": width * frame["width"], "height": height * frame["height"]}
        assert drawn == pytest.approx(wanted, abs=4)
    expect(card.locator(".show-boxes")).to_have_count(1 if boxes else 0)
    if boxes:
        page.locator("#boxes").evaluate("node => node.replaceChildren()")
        card.locator(".show-boxes").click()
        expect(layer.locator("rect")).to_have_count(len(boxes))
    page.get_by_role("button", name="Sample coffee").click()
    expect(layer.locator("rect")).to_have_count(0)


def test_a_model_is_asked_for_its_special_tokens(page, image_path, system):
    image = load(page, image_path)
    page.get_by_text("Options").click()
    page.get_by_label("Boxes").check()
    card = ask(page, "Where?")
    content: list[Any] = [image_part(f"lookonce:{image}"), text_part("Where?")]
    turns = [{"role": "user", "content": content}]
    reply = system.chat(turns, max_tokens=128, skip_special_tokens=False)
    same_text(card, reply["choices"][0]["message"]["content"])


def test_scores_are_bars(page, image_path, system):
    image = load(page, image_path)
    page.get_by_role("tab", name="Score").click()
    page.get_by_role("textbox", name="Question", exact=True).fill("Is it red?")
    page.get_by_label("Choices, separated by commas").fill("yes, no, perhaps, no")
    page.get_by_role("button", name="Score", exact=True).click()
    card = whole(page.locator(".answer").first)
    [answer] = system.ask(image, [{"text": "Is it red?", "choices": ["yes", "no", "perhaps"]}])
    rows = card.locator(".choice")
    expect(rows).to_have_count(3)
    for number, (choice, probability) in enumerate(answer["choices"].items()):
        expect(rows.nth(number).locator("span")).to_have_text(choice)
        expect(rows.nth(number).locator("output")).to_have_text(f"{probability * 100:.1f} %")
        bar, fill = (rows.nth(number).locator(place).bounding_box()["width"] for place in (".bar", ".bar i"))
        assert fill == pytest.approx(max(2, bar * probability), abs=1.5)
    expect(card.locator(".choice.best span")).to_have_text(answer["text"])


def test_erasing_takes_a_second_click(page, image_path, system):
    image = load(page, image_path)
    ask(page, "Seen?")
    erase = page.locator("#erase")
    erase.click()
    expect(erase).to_have_text("Click again to erase")
    assert system.http.get(f"/v1/images/{image}").status_code == 200
    page.keyboard.press("Escape")
    expect(erase).to_have_text("Erase")
    erase.click()
    erase.click()
    expect(page.locator("#empty")).to_contain_text("Erased: the file, its embedding")
    assert system.http.get(f"/v1/images/{image}").status_code == 404
    expect(page.locator(".answer")).to_have_count(0)
    expect(page.locator("#preview")).to_be_hidden()
    expect(page.locator("#chooser")).to_be_visible()


def test_everything_by_keyboard_alone(page, image_path, system):
    page.on("filechooser", lambda chooser: chooser.set_files(image_path))
    expect(page.locator("#model")).to_have_text(system.model)
    page.keyboard.press("o")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("What is here?")
    page.keyboard.press("Enter")
    whole(page.locator(".answer").first)
    page.keyboard.press("Shift+Tab")
    expect(page.locator("#tab-one")).to_be_focused()
    ring = page.locator("#tab-one").evaluate("node => getComputedStyle(node).outlineStyle")
    assert ring == "solid"
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-many")).to_be_focused()
    expect(page.locator("#panel-many")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("#questions")).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type("One?\nTwo?")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#tally")).to_contain_text("2 of 2 in")
    expect(page.locator(".answer")).to_have_count(3)
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("End")
    expect(page.locator("#panel-score")).to_be_visible()
    page.keyboard.press("1")
    expect(page.locator("#question")).to_be_focused()
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "erase":
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator("#empty")).to_contain_text("Erased")
    expect(page.locator("#status")).to_contain_text("Erased")


def test_a_stream_can_be_stopped(page, image_path):
    load(page, image_path)
    page.get_by_text("Options").click()
    page.get_by_label("Longest answer (tokens)").fill("8000")
    page.get_by_label("Temperature").fill("1.5")
    newest = page.locator(".answer .text").first
    for asked in range(1, 21):  # a random model may end its answer by itself, whenever it likes
        page.get_by_role("textbox", name="Question", exact=True).fill("All of it?")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".answer")).to_have_count(asked)
        page.keyboard.press("Escape")
        expect(page.locator("#stop")).to_be_hidden()
        expect(page.locator(".answer.writing")).to_have_count(0)
        if "(stopped)" in newest.inner_text():
            return
    pytest.fail("twenty answers ended before they could be stopped")


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_an_image_can_be_dropped_or_pasted(page, image_path, kind):
    expect(page.locator("#model")).not_to_have_text("connecting…")
    arguments = [image_path.name, list(image_path.read_bytes()), kind]
    if kind == "drop":
        page.evaluate(DROP, [*arguments[:2], "dragover"])
        expect(page.locator("#drop")).to_have_class(re.compile("over"))
    page.evaluate(DROP, arguments)
    expect(page.locator("#fact-size")).to_have_text("112 × 84")
    expect(page.locator("#preview")).to_have_attribute("alt", "The image my image.png")
    expect(page.locator("#drop")).not_to_have_class(re.compile("over"))


def test_samples(page, samples):
    buttons = page.locator("#sample-list button")
    expect(buttons).to_have_count(12)
    page.get_by_role("button", name="Sample coffee").click()
    expect(page.locator("#fact-size")).to_have_text("84 × 112")
    for place in ("#sample-list img", "#preview"):
        page.wait_for_function("(p) => (n => n.complete && n.naturalWidth > 0)(document.querySelector(p))", arg=place)


def test_errors_are_shown_where_they_belong(open_page, image_path, tmp_path):
    watched = open_page()
    watched.expected.add("status of 400")  # Chromium reports refused requests by itself
    page = watched.page
    page.get_by_role("textbox", name="Question", exact=True).fill("About what?")
    page.keyboard.press("Enter")
    expect(page.locator("#ask-error")).to_have_text("Choose an image first.")
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"not an image")
    page.get_by_label("Choose an image", exact=True).set_input_files(wrong)
    expect(page.locator("#image-error")).to_have_text(re.compile(r"\(request req_\w+\)"))
    expect(page.locator("#chooser")).to_be_visible()
    load(page, image_path)
    expect(page.locator("#image-error")).to_be_hidden()
    page.get_by_role("textbox", name="Question", exact=True).fill("word " * 20_000)
    page.keyboard.press("Enter")
    expect(page.locator(".answer .error")).to_contain_text(re.compile("context|tokens"))
    page.keyboard.press("Tab")
    page.get_by_role("tab", name="Score").click()
    page.get_by_role("textbox", name="Question", exact=True).fill("Red?")
    page.get_by_label("Choices, separated by commas").fill("yes")
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("#ask-error")).to_contain_text("two or more")


@pytest.fixture
def locked(system: System) -> Iterator[str]:
    """URL of a gateway that wants a key."""
    vision, language = system.visions[0].address, system.languages[0].address
    gateway = GatewayProcess("--vision", vision, "--lm", language, env={"LOOKONCE_GATEWAY_API_KEYS": KEY})
    yield gateway.wait_ready().url
    gateway.close()


def test_a_gateway_with_keys_asks_for_one(locked, open_page, image_path, system):
    watched = open_page(locked)
    watched.expected.add("status of 401")
    page = watched.page
    field = page.get_by_label("This gateway wants an API key")
    expect(field).to_be_focused()
    page.keyboard.type("not-the-right-key-at-all")
    page.keyboard.press("Enter")
    expect(page.locator("#key-hint")).to_contain_text("refused")
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text(system.model)
    expect(page.locator("#key-form")).to_be_hidden()
    load(page, image_path)
    ask(page, "With a key?")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_is_readable_in_both_schemes_and_on_a_phone(open_page, image_path, scheme, width):
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 760}).page
    load(page, image_path)
    ask(page, "An unbroken word: " + "x" * 200)
    page.get_by_role("tab", name="Score").click()
    page.get_by_role("textbox", name="Question", exact=True).fill("Is it?")
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator(".choice")).to_have_count(2)
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    assert dark == (scheme == "dark")
    small = (
        "nodes => nodes.filter((n) => n.checkVisibility() && n.getBoundingClientRect().height < 36).map((n) => n.id)"
    )
    assert page.locator("button, input:not([type=file]), textarea").evaluate_all(small) == []


def test_the_watch_sees_a_planted_violation(open_page):
    watched = open_page()
    watched.page.evaluate("document.body.setAttribute('style', 'color: red')")
    watched.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    expect(watched.page.locator("body")).not_to_have_css("color", "rgb(255, 0, 0)")
    watched.page.wait_for_function("new Set(window.violations.map((text) => text.split(' ')[0])).size >= 2")
    directives = {text.split()[0] for text in watched.violations()}
    assert directives == {"style-src-attr", "img-src"}
    watched.page.evaluate("window.violations = []")
    watched.expected.add("Content Security Policy")
