"""Every file of deploy/ holds, and the checks see planted mistakes: in files, and in rendered objects."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import yaml

from deploy.check import compose, docker, helm, metrics, objects
from tests.processes import ROOT

USED = (
    "gateway",
    "lookonce",
    "lm_service",
    "vision_service",
    "protos",
    "pyproject.toml",
    "constraints.txt",
    "LICENSE",
    "docs",
)


@pytest.fixture(scope="module")
def rendered():
    """The objects of each profile."""
    profiles = sorted((ROOT / helm.PROFILES).glob("*.yaml"))
    found = {profile.stem: helm.render(ROOT, profile) for profile in profiles}
    assert all(isinstance(items, list) for items in found.values()), found
    return found


@pytest.fixture
def tree(tmp_path):
    """The repository as the checks see it, with a deploy/ that may be changed."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("__pycache__", "check"))
    for name in (*USED, "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def plant(tree, file, old, new):
    path = tree / "deploy" / file
    text = path.read_text()
    assert old in text, f"{file} no longer has {old!r}"
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("check", [docker.check, compose.check, metrics.check])
def test_files_hold(check):
    assert list(check(ROOT)) == []


def test_rendered_objects_hold(rendered):
    for profile, items in rendered.items():
        assert list(objects.check(profile, items)) == []
        assert len(items) >= 12


@pytest.mark.slow
def test_the_chart_holds_whole_linted_and_against_each_version():
    assert list(helm.check(ROOT)) == []


DOCKER = [
    ("gateway", "USER 10001:10001", "USER root", "other than root"),
    ("vision", "HEALTHCHECK", "# HEALTHCHECK", "no HEALTHCHECK"),
    ("vision", "${LOOKONCE_VISION_LISTEN}", "127.0.0.1:50051", "at a fixed port"),
    ("language", "3.11.14-slim-bookworm", "latest", "not pinned"),
    ("gateway", "--group gateway", "--group everything", "no dependency group everything"),
    ("gateway", "--group gateway", "--group gateway torch", "has no torch"),
    ("vision", "COPY lm_service lm_service", "COPY llm_service lm_service", "not there"),
    ("language", '"-m", "lm_service"', '"-m", "llm_service"', "no module of ours"),
    ("vision", "WORKDIR /src", "WORKDIR src", "DL3000"),
    ("vision", "--no-deps .\n", "--no-deps . && python -m compileall /opt\n", "files for other Pythons"),
]


@pytest.mark.parametrize(("part", "old", "new", "said"), DOCKER)
def test_mistakes_in_dockerfiles(tree, part, old, new, said):
    plant(tree, f"docker/{part}.Dockerfile", old, new)
    assert any(said in problem for problem in docker.check(tree)), list(docker.check(tree))


COMPOSE = [
    ("compose", "read_only: true", "read_only: false", "must be read-only"),
    ("compose", "cap_drop: [ALL]", "cap_drop: []", "drop all capabilities"),
    ("compose", "LOOKONCE_VISION_DEVICE: cpu", "LOOKONCE_VISION_DEVISE: cpu", "no setting of the vision service"),
    ("compose", "LOOKONCE_LM_MODEL: ${LOOKONCE_MODEL:?set a checkpoint}", "LOOKONCE_LM_DTYPE: int3", "--model"),
    ("compose", "LOOKONCE_GATEWAY_LM: language:50052", "LOOKONCE_GATEWAY_LM: words:50052", "names words"),
    ("compose", "valkey/valkey:9.1-alpine", "valkey/valkey", "not pinned"),
    ("compose", "${LOOKONCE_BIND:-127.0.0.1}", "${LOOKONCE_BIND:-0.0.0.0}", "published on 127.0.0.1"),
    ("compose", "${STORE_MEMORY:-4gb}", "${STORE_MEMORY}", "may be unset"),
    ("compose", '--protected-mode, "no"', '--databases, "1"', "--protected-mode no must be said"),
    ("compose", "      interval: 5s\n", "      intervall: 5s\n", "intervall"),
    ("monitoring", "../prometheus/rules.yaml:", "../prometheus/rule.yaml:", "not there"),
    ("gpus", "      LOOKONCE_LM_DEVICE: cuda:0", "      LOOKONCE_LM_DTYPE: fp64", "LOOKONCE_LM_DTYPE='fp64'"),
]


@pytest.mark.parametrize(("file", "old", "new", "said"), COMPOSE[2:4])
def test_mistakes_in_compose_files(tree, file, old, new, said):
    plant(tree, f"compose/{file}.yaml", old, new)
    assert any(said in problem for problem in compose.check(tree)), list(compose.check(tree))


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "said"), COMPOSE[:2] + COMPOSE[4:])
def test_more_mistakes_in_compose_files(tree, file, old, new, said):
    test_mistakes_in_compose_files(tree, file, old, new, said)


TEMPLATES = [
    ("_model_pod.tpl", "{{ $settings.device | quote }}", "{{ $settings.devise }}", "value is unset"),
    ("gateway.yaml", "{{ .Values.gateway.replicas }}", "{{ .Values.gateway.replica }}", "spec.replicas is unset"),
    ("store.yaml", "- volatile-lru", "- {{ .Values.store.policy }}", "args is unset"),
    ("store.yaml", "- --protected-mode", "- --databases", "--protected-mode no must be said"),
    ("gateway.yaml", "path: /readyz", "path: {{ .Values.nothing }}", "path is unset"),
    ("network.yaml", '"part" "store" "model" ""', '"part" "stores" "model" ""', "reach store"),
    ("secrets.yaml", "api-keys:", "keys:", "has no key api-keys"),
]


@pytest.mark.parametrize(("file", "old", "new", "said"), TEMPLATES)
def test_mistakes_in_templates(tree, file, old, new, said):
    plant(tree, f"helm/lookonce/templates/{file}", old, new)
    items = helm.render(tree, tree / helm.PROFILES / "laptop.yaml")
    assert isinstance(items, list), items
    problems = list(objects.check("planted", items))
    assert any(said in problem for problem in problems), problems


GROUPS = [
    ("models.yaml", "restartPolicy: RecreateGroupOnPodRestart", "restartPolicy: None", "waits for ever"),
    ("models.yaml", "size: {{ $nodes }}", "size: 1", "two at least"),
    ("_model_pod.tpl", "LOOKONCE_LM_TENSOR_PARALLEL", "LOOKONCE_LM_TENSORS", "LOOKONCE_LM_TENSORS is no setting"),
    ("network.yaml", '"language" "language-worker"', '"language-worker"', "cannot reach stable language"),
]


@pytest.mark.parametrize(("file", "old", "new", "said"), GROUPS)
def test_mistakes_in_a_group_of_pods(tree, file, old, new, said):
    """A language service over several machines, by Ray."""
    plant(tree, f"helm/lookonce/templates/{file}", old, new)
    items = helm.render(tree, tree / helm.PROFILES / "vllm-nodes.yaml")
    assert isinstance(items, list), items
    problems = list(objects.check("planted", items))
    problems += [text for item in items for text in helm.schema("planted", item)]
    assert any(said in problem for problem in problems), problems


def test_a_group_of_pods_joins_ray_and_shares_memory(rendered):
    [group] = [item for item in rendered["vllm-nodes"] if item["kind"] == "LeaderWorkerSet"]
    template = group["spec"]["leaderWorkerTemplate"]
    leader, worker = (template[name]["spec"]["containers"][0] for name in ("leaderTemplate", "workerTemplate"))
    assert template["size"] == 2
    assert "exec python -m lm_service" in leader["args"][0] and "$LWS_LEADER_ADDRESS:6379" in worker["args"][0]
    for one in (leader, worker):
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in one["volumeMounts"]
        assert "-vllm:" in one["image"]


def test_a_chart_without_keys_is_not_rendered(tree):
    plant(tree, "helm/profiles/laptop.yaml", "apiKeys: {value: change-me-to-something-long}", "")
    answer = helm.render(tree, tree / helm.PROFILES / "laptop.yaml")
    assert isinstance(answer, str) and "apiKeys.value or apiKeys.existingSecret is required" in answer


def find(items, kind, name):
    return next(item for item in items if item["kind"] == kind and item["metadata"]["name"] == f"lookonce-{name}")


def container(items, name):
    return find(items, "Deployment", name)["spec"]["template"]["spec"]["containers"][0]


def env(items, name, variable):
    return next(one for one in container(items, name)["env"] if one["name"] == variable)


OBJECTS = {
    "short key": (
        lambda items: find(items, "Secret", "gateway")["stringData"].update({"api-keys": "short"}),
        "shorter than",
    ),
    "root": (
        lambda items: container(items, "stable-vision")["securityContext"].update(readOnlyRootFilesystem=False),
        "must be read-only",
    ),
    "unknown setting": (
        lambda items: env(items, "gateway", "LOOKONCE_GATEWAY_PORT").update(name="LOOKONCE_GATEWAY_PROT"),
        "LOOKONCE_GATEWAY_PROT is no setting",
    ),
    "bad value": (
        lambda items: env(items, "stable-language", "LOOKONCE_LM_DTYPE").update(value="int3"),
        "LOOKONCE_LM_DTYPE='int3'",
    ),
    "probe": (
        lambda items: container(items, "stable-vision")["readinessProbe"]["grpc"].update(port=50052),
        "asks port 50052",
    ),
    "drain": (
        lambda items: find(items, "Deployment", "gateway")["spec"]["template"]["spec"].update(
            terminationGracePeriodSeconds=30
        ),
        "before its drain",
    ),
    "selector": (
        lambda items: find(items, "Service", "stable-vision")["spec"]["selector"].update({"lookonce.dev/model": "x"}),
        "selects no pods",
    ),
    "not headless": (
        lambda items: find(items, "Service", "stable-language")["spec"].pop("clusterIP"),
        "must be headless",
    ),
    "open store": (
        lambda items: find(items, "NetworkPolicy", "store")["spec"]["ingress"][0].pop("from"),
        "reaches",
    ),
    "gateway cut off": (
        lambda items: find(items, "NetworkPolicy", "gateway")["spec"]["egress"].pop(1),
        "gateway cannot reach stable language",
    ),
    "empty": (
        lambda items: env(items, "stable-vision", "LOOKONCE_VISION_DEVICE").update(value=""),
        "is empty",
    ),
}


def assert_found(items, change, said):
    """What the check says of a copy of these objects with a change in it."""
    planted = copy.deepcopy(items)
    change(planted)
    problems = list(objects.check("planted", planted))
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("mistake", OBJECTS)
def test_mistakes_in_objects(rendered, mistake):
    assert_found(rendered["laptop"], *OBJECTS[mistake])


def readiness(items, name):
    return container(items, name)["readinessProbe"]["exec"]["command"]


TLS = {
    "no mount": (
        lambda items: container(items, "gateway")["volumeMounts"].pop(1),
        "ca.crt is not mounted",
    ),
    "no such file": (
        lambda items: env(items, "stable-vision", "LOOKONCE_VISION_TLS_KEY").update(value="/etc/lookonce-tls/key.pem"),
        "no Secret for TLS holds key.pem",
    ),
    "no such secret": (
        lambda items: find(items, "Certificate", "stable-language")["spec"].update(secretName="other"),
        "there is no Secret lookonce-stable-language-tls",
    ),
    "kubelet's probe": (
        lambda items: container(items, "stable-vision").update(readinessProbe={"grpc": {"port": 50051}}),
        "readinessProbe: the kubelet's gRPC probe speaks no TLS",
    ),
    "probe without a certificate": (
        lambda items: readiness(items, "stable-language").pop(),
        "shows no certificate where one is demanded",
    ),
    "probe that trusts nobody": (
        lambda items: readiness(items, "stable-language").remove("--tls-ca=/etc/lookonce-tls/ca.crt"),
        "cannot check the certificate",
    ),
    "service in the clear": (
        lambda items: container(items, "stable-vision")["env"].remove(
            env(items, "stable-vision", "LOOKONCE_VISION_TLS_CERTIFICATE")
        ),
        "LOOKONCE_LM_VISION_TLS_CA must be set if, and only if, Deployment/lookonce-stable-vision serves TLS",
    ),
    "caller without a certificate": (
        lambda items: container(items, "gateway")["env"].remove(
            env(items, "gateway", "LOOKONCE_GATEWAY_RPC_TLS_CERTIFICATE")
        ),
        "Deployment/lookonce-stable-language demands a certificate; LOOKONCE_GATEWAY_RPC_TLS_CERTIFICATE is not set",
    ),
    "another's name": (
        lambda items: find(items, "Certificate", "stable-vision")["spec"]["dnsNames"].pop(0),
        "its certificate is not for lookonce-stable-vision",
    ),
    "servers only": (
        lambda items: find(items, "Certificate", "stable-language")["spec"]["usages"].remove("client auth"),
        "must serve for server auth and client auth",
    ),
    "no issuer": (
        lambda items: find(items, "Certificate", "gateway")["spec"]["issuerRef"].pop("name"),
        "issuerRef needs a name",
    ),
}


@pytest.mark.parametrize("mistake", TLS)
def test_mistakes_with_tls(rendered, mistake):
    assert_found(rendered["tls"], *TLS[mistake])


def test_tls_without_certificates_is_not_rendered(tree):
    plant(tree, "helm/profiles/tls.yaml", "certManager: {issuer: lookonce-ca}", "secrets: {gateway: one}")
    answer = helm.render(tree, tree / helm.PROFILES / "tls.yaml")
    assert isinstance(answer, str) and "tls.secrets.vision or tls.certManager.issuer is required" in answer


def test_one_sided_tls_shows_no_certificates(rendered):
    items = rendered["canary"]
    given = {one["name"] for one in container(items, "gateway")["env"]}
    assert "LOOKONCE_GATEWAY_RPC_TLS_CA" in given and "LOOKONCE_GATEWAY_RPC_TLS_CERTIFICATE" not in given
    assert not any(part.startswith("--tls-certificate") for part in readiness(items, "canary-vision"))
    assert not [item for item in items if item["kind"] == "Certificate"]


def test_mistakes_that_kubernetes_schema_sees(rendered):
    item = copy.deepcopy(find(rendered["laptop"], "Deployment", "gateway"))
    assert list(helm.schema("whole", item)) == []
    item["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    assert any("livenesProbe" in problem for problem in helm.schema("planted", item))
    item = copy.deepcopy(find(rendered["canary"], "HorizontalPodAutoscaler", "stable-language"))
    item["spec"]["maxReplicas"] = "four"
    assert any("four" in problem for problem in helm.schema("planted", item))
    scaled = copy.deepcopy(find(rendered["gpus"], "ScaledObject", "stable-language"))
    assert list(objects.scaled_object(scaled)) == []
    scaled["spec"]["triggers"][0]["metadata"].pop("threshold")
    assert any("lacks threshold" in problem for problem in objects.scaled_object(scaled))


def test_a_canary_gets_its_share_and_its_halves_meet_nobody_else_s(rendered):
    items = rendered["canary"]
    lines = find(items, "ConfigMap", "gateway-variants")["data"]["variants"].split("\n")
    assert lines[0].startswith("stable weight=95 ") and lines[1].startswith("canary weight=5 ")
    changed = copy.deepcopy(items)
    policy = find(changed, "NetworkPolicy", "canary-vision")["spec"]["ingress"][0]["from"][1]
    policy["podSelector"]["matchLabels"]["lookonce.dev/model"] = "stable"
    said = list(objects.check("planted", changed))
    assert any("stable language reaches canary vision" in problem for problem in said) or any(
        "canary language cannot reach canary vision" in problem for problem in said
    ), said


METRICS = [
    (
        "prometheus/rules.yaml",
        "lookonce_lm_waiting",
        "lookonce_lm_wating",
        "no service has a metric lookonce_lm_wating",
    ),
    ("prometheus/rules.yaml", 'status=~"5.."', 'code=~"5.."', "has no label code"),
    ("prometheus/rules.yaml", "sum by (variant)", "sum by (varient)", "label varient"),
    ("prometheus/rules.yaml", "severity: page", "severity: scream", "severity must be"),
    (
        "prometheus/rules.yaml",
        "max by (instance, store, namespace) (",
        "max by (instance, store, namespace) ((",
        "LookonceStoreDegraded",
    ),
    ("grafana/dashboards/overview.json", "lookonce_gateway_tokens_total", "lookonce_gateway_tokens", "no service has"),
]


@pytest.mark.parametrize(("file", "old", "new", "said"), METRICS)
def test_mistakes_in_queries(tree, file, old, new, said):
    plant(tree, file, old, new)
    problems = list(metrics.check(tree))
    assert any(said in problem for problem in problems), problems


def test_mistakes_in_names_of_metrics():
    bad = metrics.Metric("lookonce_lm_wait_ms_total", "gauge", frozenset())
    assert len(list(metrics._named_well(bad))) == 2
    assert len(metrics.declared(ROOT)) > 50
    assert metrics.declared(ROOT)["lookonce_store_hits_total"].labels == {"store", "namespace"}


def test_profiles_and_dashboards_are_there():
    assert {path.stem for path in (ROOT / helm.PROFILES).glob("*.yaml")} >= {"laptop", "gpus", "canary", "tls"}
    for file in (ROOT / metrics.DASHBOARDS).glob("*.json"):
        assert json.loads(file.read_text())["uid"].startswith("lookonce-")
    assert yaml.safe_load((ROOT / "deploy/prometheus/compose.yaml").read_text())["scrape_configs"]
