"""Moderation by the policy of a gateway, blocking and not."""

from __future__ import annotations

import pytest

import lookonce
from lookonce.client import BadRequestError, Moderation
from tests.processes import ROOT

POLICY = ROOT / "examples" / "policies" / "shapes.yaml"
IMAGE_RULES = {"star", "red-circle", "crowded", "cross"}


@pytest.fixture(scope="module")
def moderating(another_gateway):
    return another_gateway("--policy", str(POLICY)).wait_ready().url


async def test_images_and_texts_are_judged_together_by_both_clients(moderating, new_image):
    drawn = new_image()
    with lookonce.Client(moderating) as client:
        image = client.image(drawn)
        verdict = client.moderate(image, "Brand new")
        assert isinstance(verdict, Moderation) and verdict.receipt.embedding == "hit"
        assert set(verdict.categories) == set(verdict.scores) == set(verdict.applied) == IMAGE_RULES
        assert verdict.flagged == any(verdict.categories.values()) == (verdict.severity is not None)
        assert all(0 <= score <= 1 for score in verdict.scores.values()) and "image" in verdict.applied["star"]
        text = client.moderate("Just words")
        assert (text.flagged, set(text.categories)) == (False, IMAGE_RULES)
        with pytest.raises(lookonce.LookonceError, match="something to moderate"):
            client.moderate()
    async with lookonce.AsyncClient(moderating) as twin:
        same = await twin.moderate(await twin.image(drawn), "Brand new")
        assert same.scores == pytest.approx(verdict.scores, rel=1e-3)


def test_a_gateway_without_a_policy_says_so(client):
    with pytest.raises(BadRequestError, match="--policy"):
        client.moderate("Words")
