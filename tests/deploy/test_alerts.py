"""Alerts, evaluated by promtool over series that were made up for them."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml

from deploy.check import metrics
from tests.processes import ROOT

GONE, DOWN = "LookonceServiceGone", "LookonceServiceDown"
pytestmark = pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's prometheus (apt-get install it)")


def series(name: str, values: str) -> dict[str, str]:
    return {"series": name, "values": values}


def test_a_service_that_discovery_drops_altogether_is_missed(tmp_path):
    """All three for 5 minutes; then nothing is known of the encoder, and the language service does not answer."""
    given = [
        series('up{job="lookonce", instance="gateway"}', "1x30"),
        series('lookonce_gateway_in_flight{job="lookonce", instance="gateway"}', "0x30"),
        series('up{job="lookonce", instance="vision"}', "1x5 stale"),
        series('lookonce_vision_waiting_patches{job="lookonce", instance="vision"}', "0x5 stale"),
        series('up{job="lookonce", instance="language"}', "1x5 0x25"),
        series('lookonce_lm_waiting{job="lookonce", instance="language"}', "0x5 stale"),
    ]
    expected = {(GONE, "4m"): [], (DOWN, "4m"): [], (GONE, "9m"): [], (DOWN, "9m"): ["language"],
                (GONE, "12m"): ["vision", "language"], (DOWN, "12m"): ["language"]}  # fmt: skip
    tests = [
        {"eval_time": at, "alertname": alert, "exp_alerts": [alerted(alert, name) for name in names]}
        for (alert, at), names in expected.items()
    ]
    file = tmp_path / "test.yaml"
    whole = {"interval": "1m", "input_series": given, "alert_rule_test": tests}
    file.write_text(yaml.safe_dump({"rule_files": [str(ROOT / metrics.RULES)], "tests": [whole]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def alerted(alert: str, name: str) -> dict[str, dict[str, str]]:
    rules = yaml.safe_load((ROOT / metrics.RULES).read_text())["groups"][0]["rules"]
    texts = next(rule["annotations"] for rule in rules if rule["alert"] == alert)
    label = "service" if alert == GONE else "instance"
    more = {} if alert == GONE else {"job": "lookonce"}
    filled = {key: text.replace("{{ $labels." + label + " }}", name) for key, text in texts.items()}
    return {"exp_labels": {"severity": "page", label: name, **more}, "exp_annotations": filled}
