"""The policy file that the gateway and `lookonce moderate` share: every error names line and field."""

from __future__ import annotations

import pytest

from lookonce.core.errors import LookonceError
from lookonce.moderation.batch.run_identity import Models
from lookonce.moderation.policy import parse_policy, read_policy
from protos.lookonce.v1 import language_pb2, vision_pb2
from tests.processes import ROOT

EXAMPLES = sorted(path.name for path in (ROOT / "examples/policies").glob("*.yaml"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_policies(name: str) -> None:
    policy = read_policy(ROOT / "examples/policies" / name)
    assert len(policy.rules) >= 3 and policy.description


def test_the_examples_cover_what_people_check() -> None:
    assert {"safety.yaml", "product.yaml", "documents.yaml", "shapes.yaml"} <= set(EXAMPLES)


def test_yes_and_no_stay_words() -> None:
    (rule,) = parse_policy("rules: [{id: a, question: q, choices: [yes, no], positive: no}]").rules
    assert rule.choices == ("yes", "no") and rule.positive == ("no",)


def test_several_choices_can_fire_a_rule() -> None:
    text = "rules: [{id: a, question: q, choices: [none, one, many], positive: [one, many], threshold: 0.7}]"
    (rule,) = parse_policy(text).rules
    score = rule.score({"none": 0.25, "one": 0.5, "many": 0.25})
    assert score == 0.75 and rule.fires(score)
    with pytest.raises(LookonceError):
        rule.score({"none": 0.5, "one": 0.5})


def test_a_rule_has_the_policys_size_limits_unless_it_has_its_own() -> None:
    policy = parse_policy("""
image_size: {min_width: 100, max_height: 1000}
rules:
- {id: a, question: q}
- {id: b, question: q, image_size: {min_width: 50}}
- {id: c, question: q, image_size: {}}
""")
    ids = {size: [rule.id for rule in policy.of("image", size)] for size in ((100, 1000), (60, 10), (10, 2000))}
    assert ids == {(100, 1000): ["a", "b", "c"], (60, 10): ["b", "c"], (10, 2000): ["c"]}
    assert len(policy.of("image")) == 3


def test_the_digest_covers_what_decides_and_nothing_else() -> None:
    base = "name: x\nrules:\n- {id: a, question: q, description: d}\n"
    digest = parse_policy(base).digest
    assert parse_policy(base.replace("name: x", "name: y").replace("description: d", "audience: e")).digest == digest
    assert parse_policy(base.replace("rules:", "categories:")).digest == digest
    for old, new in (("question: q", "question: r"), ("id: a", "id: b"), ("name: x", "system: x")):
        assert parse_policy(base.replace(old, new)).digest != digest
    for field in (
        "threshold: 0.6",
        "severity: low",
        "follow_up: f",
        "image_size: {min_width: 2}",
        "applies_to: [text]",
    ):
        assert parse_policy(base.replace("question: q", f"question: q, {field}")).digest != digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "line 1: not valid YAML"),
        ("- a", "line 1: a policy has the field 'rules'"),
        ("name: x", "line 1: 'rules' is required"),
        ("rules:\n- id: a\n", "line 2: 'rules.0.question' is required"),
        ("categories:\n- id: a\n", "line 2: 'categories.0.question' is required"),
        ("rules:\n- {id: a, question: q}\ncategories:\n- {id: b, question: q}", "line 3: 'categories' is another name"),
        ("rules:\n- id: a\n  question: q\n  threshhold: 1", "line 4: 'rules.0.threshhold' is unknown"),
        ("rules:\n- id: a\n  question: q\n  threshold: 1.5", "line 4: 'rules.0.threshold' must be at most"),
        ("rules:\n- id: a\n  question: q\n  threshold: half", "line 4: 'rules.0.threshold' must be a number"),
        ("rules:\n- id: A b\n  question: q", "line 2: 'rules.0.id' must be made of"),
        ("rules:\n- id: a\n  question: q\n  severity: bad", "line 4: 'rules.0.severity' must be one of"),
        ("rules:\n- id: a\n  question: q\n  choices: [a, b]", "line 2: 'rules.0': positive is 'yes'"),
        ("rules:\n- id: a\n  question: q\n  positive: [yes, no]", "line 2: 'rules.0': with every choice positive"),
        ("rules:\n- id: a\n  question: q\n  positive: []", "line 4: 'rules.0.positive' must have at least 1"),
        ("rules:\n- id: a\n  question: q\n  follow_up: ''", "line 4: 'rules.0.follow_up' must not be empty"),
        ("rules:\n- id: a\n  question: q\n  follow_up_tokens: 1.5", "line 4: 'rules.0.follow_up_tokens' must be a"),
        ("rules:\n- id: a\n  question: q\n  image_size:\n    min_width: 0", "line 5: 'rules.0.image_size.min_width'"),
        ("max_pixels: 0\nrules:\n- {id: a, question: q}", "line 1: 'max_pixels' must be at least 1"),
        ("rules:\n- id: a\n  id: b", "line 3: 'id' is there twice"),
        ("categories:\n- {id: a, question: q}\n- {id: a, question: q}", "line 1: 'categories': the id 'a' is there"),
        ("rules: &x\n- *x", "aliases"),
        ("rules: !!python/object/apply:os.getcwd []", "line 1: 'rules' must have at least 1"),
    ],
)  # fmt: skip
def test_a_bad_policy_names_line_and_field(text: str, message: str) -> None:
    with pytest.raises(LookonceError) as caught:
        parse_policy(text)
    assert message in caught.value.message


def test_a_bound_below_the_models_smallest_image_is_refused_when_the_model_is_known() -> None:
    vision = vision_pb2.VisionDescription(fingerprint="a", max_pixels=10_000, least_pixels=784)
    language = language_pb2.LanguageDescription(fingerprints=["a"])

    def models(most: int) -> Models:
        return Models.of(vision, language, parse_policy(f"max_pixels: {most}\nrules:\n- {{id: a, question: q}}"))

    assert models(784).max_pixels == 784
    with pytest.raises(LookonceError, match="'max_pixels' must be at least 784, got 783"):
        models(783)
