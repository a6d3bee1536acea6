"""One judge: a gateway and the batch command say the same of the same images, to the last digit; and its arithmetic."""

from __future__ import annotations

import base64
import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.moderation import judging
from lookonce.moderation.policy import Rule, parse_policy
from tests.gateway.processes import GatewayProcess
from tests.moderate.conftest import MODEL
from tests.moderate.scenes import policy_text

COUNT = 12


def test_gateway_and_command_judge_alike(pair, images, policy, results, tmp_path):
    rules = parse_policy(policy.read_text()).rules
    rows = {row["source"]: row for row in pq.read_table(results).to_pylist() if row["error"] is None}
    ranked = sorted(rows, key=lambda source: rows[source]["score_cross"])
    chosen = [*ranked[: COUNT // 2], *ranked[-COUNT // 2 :]]  # without a follow-up, and with one
    services = (*pair.arguments(), "--store", "memory://", "--data-dir", str(tmp_path))
    with GatewayProcess(*services, "--policy", str(policy)) as process, process.client() as http:
        for source in chosen:
            (result,) = http.post("/v1/moderations", json=shown(source)).json()["results"]
            row = rows[source]
            assert result["category_scores"] == {rule.id: row[f"score_{rule.id}"] for rule in rules}
            assert result["categories"] == {rule.id: row[f"fired_{rule.id}"] for rule in rules}
            assert (result["flagged"], result["severity"]) == (row["flagged"], row["severity"])
            follow_up = row["follow_up_cross"]
            assert result["follow_ups"] == ({} if follow_up is None else {"cross": [follow_up]})
    assert {rows[source]["fired_cross"] for source in chosen} == {True, False}


def test_they_scale_images_alike_to_fewer_pixels_than_the_checkpoint_does(pair, images, tmp_path):
    """Between the pixels of one token and the checkpoint's min_pixels."""
    bounds = json.loads((MODEL / "preprocessor_config.json").read_text())
    policy, out = tmp_path / "policy.yaml", tmp_path / "out.parquet"
    policy.write_text(f"max_pixels: {bounds['min_pixels'] // 2}\n{policy_text()}")
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(Path(images.folder).rglob("*.png"))[:4]:
        shutil.copy(path, folder)
    assert pair.moderate(folder, policy, out).returncode == 0
    rows = [row for row in pq.read_table(out).to_pylist() if row["error"] is None]
    assert len(rows) >= 2
    services = (*pair.arguments(), "--store", "memory://", "--data-dir", str(tmp_path))
    with GatewayProcess(*services, "--policy", str(policy)) as process, process.client() as http:
        for row in rows:
            (result,) = http.post("/v1/moderations", json=shown(row["source"])).json()["results"]
            assert result["category_scores"] == {rule: row[f"score_{rule}"] for rule in result["category_scores"]}
        tokens = [image["tokens"] for image in http.get("/v1/images").json()["data"]]
    least = bounds["patch_size"] ** 2 * bounds["merge_size"] ** 2
    assert len(tokens) == len(rows) and max(tokens) <= bounds["min_pixels"] // 2 // least


def shown(source: str) -> dict:
    url = "data:image/png;base64," + base64.b64encode(Path(source).read_bytes()).decode()
    return {"input": [{"type": "image_url", "image_url": {"url": url}}]}


def rule(**fields: object) -> Rule:
    return Rule.model_validate({"id": "a", "question": "?", **fields})


def test_scores_are_normalised_over_the_choices_and_not_rounded():
    halves = {"yes": math.log(0.2), "no": math.log(0.1)}
    assert judging.score(rule(), halves) == pytest.approx(2 / 3, abs=1e-15)
    assert judging.score(rule(), {"yes": -2000.0, "no": -2001.0}) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-15)
    many = rule(choices=["none", "one", "many"], positive=["one", "many"])
    assert judging.score(many, dict.fromkeys(many.choices, -1.0)) == pytest.approx(2 / 3, abs=1e-15)
    with pytest.raises(LookonceError) as caught:
        judging.score(many, {"none": 0.0, "one": 0.0})
    assert caught.value.kind is ErrorKind.INTERNAL


def test_a_verdict_is_of_the_rules_that_were_asked():
    rules = [rule(id="a", threshold=0.5, severity="low"), rule(id="b", severity="critical"), rule(id="c")]
    verdict = judging.judge(rules, {"a": 0.5, "c": math.nextafter(0.5, 0)})
    assert verdict.labels == {"a": True, "c": False} and verdict.flagged and verdict.severity == "low"
    assert judging.judge(rules, {"a": 0.9, "b": 0.9}).severity == "critical"
    nothing = judging.judge(rules, {})
    assert nothing.labels == {} and not nothing.flagged and nothing.severity is None
