"""Which value reaches which service: flags over the service's variable over the general variable over the default."""

from __future__ import annotations

import os

import pytest

from lookonce.cli.model import BUNDLED, BUNDLED_POLICY, Model
from lookonce.cli.rundir import DataDirectory
from lookonce.cli.system_plan import plan_system
from lookonce.cli.up import UpSettings
from lookonce.core.settings import load
from lookonce.moderation.policy import read_policy

MODEL = Model("owner/name", "c" * 40, "name", "hub:owner/name@" + "c" * 40, 1)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("LOOKONCE_")]:
        monkeypatch.delenv(name)


def planned(tmp_path, flags: dict, monkeypatch, **environment: str) -> dict[str, dict[str, str]]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with DataDirectory(tmp_path / "data dir") as directory:
        system = plan_system(load(UpSettings, flags), set(flags), directory, MODEL)
    return {s.name: dict(zip(s.arguments[::2], s.arguments[1::2], strict=True)) for s in system.services}


def test_the_bundled_model_comes_with_its_policy(tmp_path, monkeypatch):
    assert "--policy" not in planned(tmp_path, {}, monkeypatch)["gateway"]
    monkeypatch.setitem(globals(), "MODEL", Model(str(BUNDLED), None, "shapes", "x", 1))
    assert planned(tmp_path, {}, monkeypatch)["gateway"]["--policy"] == str(BUNDLED_POLICY)
    assert read_policy(BUNDLED_POLICY).name == "shapes"
    chosen = planned(tmp_path, {}, monkeypatch, LOOKONCE_GATEWAY_POLICY="/mine.yaml")
    assert "--policy" not in chosen["gateway"], "the gateway's own variable decides"


def test_defaults(tmp_path, monkeypatch):
    plan = planned(tmp_path, {}, monkeypatch)
    assert list(plan) == ["gateway", "language", "vision"]
    assert plan["gateway"]["--port"] == "8000"
    assert plan["gateway"]["--vision"] == plan["language"]["--vision"] == plan["vision"]["--listen"]
    assert plan["gateway"]["--lm"] == plan["language"]["--listen"]
    # A space in the path is quoted: a store URL is split into tiers at spaces.
    assert plan["vision"]["--store"] == plan["gateway"]["--store"] == f"file://{tmp_path}/data%20dir/store"
    assert plan["gateway"]["--data-dir"] == f"{tmp_path}/data dir/gateway"
    assert plan["vision"]["--revision"] == "c" * 40
    assert "--threads" not in plan["vision"] and "--max-pixels" not in plan["vision"]


@pytest.mark.parametrize(
    ("flags", "environment", "vision", "language"),
    [
        ({}, {}, "auto", "auto"),
        ({"device": "cpu"}, {}, "cpu", "cpu"),
        ({"device": "cpu", "lm_device": "cuda:1"}, {}, "cpu", "cuda:1"),
        ({}, {"LOOKONCE_DEVICE": "cpu"}, "cpu", "cpu"),
        ({}, {"LOOKONCE_DEVICE": "cpu", "LOOKONCE_LM_DEVICE": "cuda"}, "cpu", None),
        ({"device": "cpu"}, {"LOOKONCE_LM_DEVICE": "cuda"}, "cpu", "cpu"),
    ],
)
def test_device(tmp_path, monkeypatch, flags, environment, vision, language):
    """None: no flag is passed, so the service's own variable decides."""
    plan = planned(tmp_path, flags, monkeypatch, **environment)
    assert (plan["vision"].get("--device"), plan["language"].get("--device")) == (vision, language)


@pytest.mark.parametrize("given", ["flag", "variable"])
def test_a_device_map_is_the_language_services_alone(tmp_path, monkeypatch, given):
    flags = {"device": "cuda:2"} | ({"lm_device_map": "cuda:0,cuda:1"} if given == "flag" else {})
    environment = {} if given == "flag" else {"LOOKONCE_LM_DEVICE_MAP": "cuda:0,cuda:1"}
    plan = planned(tmp_path, flags, monkeypatch, **environment)
    assert plan["vision"]["--device"] == "cuda:2" and "--device-map" not in plan["vision"]
    assert plan["language"]["--device"] == "auto", "a device for both would contradict the map"
    assert plan["language"].get("--device-map", environment.get("LOOKONCE_LM_DEVICE_MAP")) == "cuda:0,cuda:1"


def test_variables_of_a_service_win_over_defaults_and_lose_to_flags(tmp_path, monkeypatch):
    variables = {
        "LOOKONCE_VISION_STORE": "redis://a",
        "LOOKONCE_GATEWAY_PORT": "9100",
        "LOOKONCE_GATEWAY_IMAGE_TTL": "1h",
    }
    plan = planned(tmp_path, {}, monkeypatch, **variables)
    assert "--store" not in plan["vision"] and plan["language"]["--store"].startswith("file://")
    assert plan["gateway"]["--port"] == "9100" and "--image-ttl" not in plan["gateway"]
    plan = planned(tmp_path, {"store": "redis://b", "port": "9200", "image_ttl": "2h"}, monkeypatch, **variables)
    assert {plan[name]["--store"] for name in plan} == {"redis://b"}
    assert plan["gateway"]["--port"] == "9200" and plan["gateway"]["--image-ttl"] == "7200.0"


def test_loopback_ports_when_the_path_is_too_long_for_a_socket(tmp_path):
    with DataDirectory(tmp_path / ("long" * 30)) as directory:
        system = plan_system(load(UpSettings, {}), set(), directory, MODEL)
    addresses = {service.name: service.address for service in system.services}
    assert addresses["vision"].startswith("127.0.0.1:") and addresses["language"].startswith("127.0.0.1:")
    assert addresses["vision"] != addresses["language"]


def test_memory_and_threads_by_service(tmp_path, monkeypatch):
    flags = {
        "threads": "4",
        "lm_threads": "8",
        "vision_tensor_cache_bytes": "1MiB",
        "lm_kv_bytes": "2GiB",
        "lm_prefix_bytes": "6GiB",
    }
    plan = planned(tmp_path, flags, monkeypatch, LOOKONCE_LM_TENSOR_CACHE_BYTES="5MiB")
    assert (plan["vision"]["--threads"], plan["language"]["--threads"]) == ("4", "8")
    assert plan["vision"]["--tensor-cache-bytes"] == str(1 << 20)
    assert "--tensor-cache-bytes" not in plan["language"], "the service's own variable decides"
    assert (plan["language"]["--kv-bytes"], plan["language"]["--prefix-bytes"]) == (str(2 << 30), str(6 << 30))
    assert "--kv-bytes" not in plan["vision"]


def test_the_language_service_is_told_of_an_encoder_in_int8(tmp_path, monkeypatch):
    plan = planned(tmp_path, {"vision_quantization": "int8"}, monkeypatch)
    assert plan["vision"]["--quantization"] == plan["language"]["--encoder-quantization"] == "int8"
    assert "--quantization" not in plan["language"]
    plan = planned(tmp_path, {"lm_quantization": "int8"}, monkeypatch, LOOKONCE_VISION_QUANTIZATION="int8")
    assert plan["language"]["--encoder-quantization"] == plan["language"]["--quantization"] == "int8"
    assert "--quantization" not in plan["vision"], "its own variable decides"
