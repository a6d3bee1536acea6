"""Scenes and questions: repeatable, true, and within what the model is taught."""

import numpy as np
import pytest

from training.shapes import pixels, questions, scenes


def test_same_seed_same_pixels():
    first, second = scenes.draw(41), scenes.draw(41)
    assert first.image.tobytes() == second.image.tobytes()
    assert first.shapes == second.shapes
    assert scenes.draw(42).image.tobytes() != first.image.tobytes()


def test_shapes_have_the_colour_they_are_said_to_have():
    """The pixel at a shape's centre is nearer to its own colour's anchors than to any other colour's, bar shading."""
    right = total = 0
    for seed in range(60):
        scene = scenes.draw(seed, size=(240, 240), wear=False)
        for number, shape in enumerate(scene.shapes):
            if any(np.hypot(shape.cx - o.cx, shape.cy - o.cy) < o.radius for o in scene.shapes[number + 1 :]):
                continue
            pixel = np.array(scene.image.getpixel((int(shape.cx), int(shape.cy))), float)
            distance = {c: min(np.abs(pixel - a).sum() for a in anchors) for c, anchors in scenes.ANCHORS.items()}
            right += min(distance, key=distance.get) == shape.colour
            total += 1
    assert total > 150
    assert right / total > 0.93


def test_shapes_lie_inside_and_in_cells_of_their_own():
    for seed in range(80):
        scene = scenes.draw(seed, 6)
        width, height = scene.image.size
        grid = scenes.grid_of(width, height)
        marks, numbers = pixels.cells(scene.shapes, scene.image.size, grid)
        assert len(set(marks[:, 0].tolist())) == len(scene.shapes)
        assert np.abs(numbers[:, :2]).max() <= 1
        assert all(0 <= s.cx <= width and 0 <= s.cy <= height for s in scene.shapes)


def test_held_out_pairs_appear_only_when_asked_for():
    def pairs(held_out):
        return {(s.colour, s.kind) for seed in range(120) for s in scenes.layout(
            np.random.default_rng(seed), 6, 196, 196, (7, 7), held_out)}  # fmt: skip

    assert not pairs("never") & scenes.HELD_OUT
    assert pairs("any") >= scenes.HELD_OUT
    scene = scenes.draw(3, held_out="one")
    assert (scene.shapes[0].colour, scene.shapes[0].kind) in scenes.HELD_OUT


@pytest.mark.parametrize("size", [(50, 50), (512, 512), (640, 480), (1920, 1080), (300, 900)])
def test_grids_stay_in_the_trained_range(size):
    rows, columns = scenes.grid_of(*size)
    assert 34 <= rows * columns <= 50


def truth(question: questions.Question, scene: scenes.Scene) -> str | None:
    """The answer worked out anew from the question's own words, for the types where that is simple."""
    words = questions.normal(question.text).split()
    kinds = [k for k in scenes.KINDS if k in words or questions.PLURAL[k] in words]
    colours = [c for c in scenes.COLOURS if c in words]
    matching = [s for s in scene.shapes if (not kinds or s.kind in kinds) and (not colours or s.colour in colours)]
    if question.type.startswith("count"):
        return str(len(matching))
    if question.type in ("exists", "policy"):
        return "yes" if matching else "no"
    if question.type == "colour":
        return matching[0].colour
    if question.type == "kind":
        return matching[0].kind
    return None


def test_answers_are_true():
    checked = 0
    for seed in range(150):
        scene = scenes.draw(seed, size=(196, 196), wear=False)
        for question in questions.ask_all(scene, np.random.default_rng(seed)):
            assert question.accepts(question.answer)
            expected = truth(question, scene)
            if expected is not None:
                assert question.answer == expected, question
                checked += 1
    assert checked > 900


def test_yes_and_no_come_equally_often():
    said = [
        question.answer
        for seed in range(300)
        for question in questions.ask_all(
            scenes.draw(seed, size=(64, 64)), np.random.default_rng(seed), ["policy", "exists"]
        )
    ]
    assert 0.4 < said.count("yes") / len(said) < 0.6


def test_judging():
    shapes = scenes.draw(9, pairs=[("red", "circle"), ("red", "circle"), ("orange", "star")], size=(300, 300)).shapes
    text = questions.describe(shapes)
    assert text == "Two red circles, an orange star."
    described = questions.Question("describe", "Describe the image.", text)
    assert described.accepts("an orange star and two red circles")
    assert described.accepts("A red circle, an orange star, a red circle.")
    assert not described.accepts("A red circle, an orange star.")
    assert not described.accepts("")
    count = questions.Question("count_all", "How many shapes are there?", "3")
    assert count.accepts("Three.") and count.accepts("3") and not count.accepts("13")
    assert questions.Question("exists", "?", "yes").accepts("Yes.")


def test_unknown_type_is_named():
    with pytest.raises(ValueError, match="unknown question type 'smell'"):
        questions.ask("smell", (), (10, 10), np.random.default_rng(0))


def test_every_type_has_eight_phrasings():
    assert all(len(set(phrases)) >= 8 for phrases in questions.PHRASES.values())
