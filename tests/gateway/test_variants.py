"""Several versions of the model behind one gateway: shares, stickiness, names in receipts and metrics, changes at run
time. That halves of two checkpoints never meet is held by tests/system/test_rollout.py."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from gateway.routing.replicas import Replicas
from gateway.routing.variants import Variant, Variants, VariantSpec, parse_variants, read_variants
from lookonce.core.errors import LookonceError
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.gateway.test_units import StandIn
from tests.ports import free_port

ImageFile = Callable[..., bytes]
KEYS = [number.to_bytes(4, "little") * 8 for number in range(2000)]


def connect(spec: VariantSpec) -> Variant:
    """On a clock that stands still: what has failed is not looked at again."""
    vision, language = ([StandIn(address) for address in half] for half in (spec.vision, spec.language))
    return Variant(spec, Replicas(vision, clock=lambda: 0.0), Replicas(language, clock=lambda: 0.0))


def variants(**weights: float) -> Variants:
    return Variants(
        [VariantSpec(name, weight, (f"v-{name}",), (f"l-{name}",)) for name, weight in weights.items()], connect
    )


def shares(pool: Variants) -> Counter[str]:
    return Counter(pool.in_order(key)[0].name for key in KEYS)


async def test_images_are_shared_out_by_weight_and_stay_where_they_are() -> None:
    pool = variants(old=90, new=10, off=0)
    homes = {key: pool.in_order(key)[0].name for key in KEYS}
    counted = Counter(homes.values())
    assert 120 < counted["new"] < 280 and counted["off"] == 0
    assert all(pool.in_order(key)[0].name == home for key, home in homes.items())
    # More weight to the new one moves images to it, and none between others or back.
    await pool.replace(
        [
            VariantSpec(v.name, 30.0 if v.name == "new" else v.spec.weight, v.spec.vision, v.spec.language)
            for v in pool.all
        ]
    )
    moved = {(homes[key], pool.in_order(key)[0].name) for key in KEYS if homes[key] != pool.in_order(key)[0].name}
    assert moved == {("old", "new")}
    assert 380 < shares(pool)["new"] < 620


def test_another_variant_stands_in_for_one_that_is_out_of_order() -> None:
    pool = variants(old=50, new=50)
    before = {key: pool.in_order(key)[0].name for key in KEYS}
    new = next(variant for variant in pool.all if variant.name == "new")
    new.language.failed(new.language.endpoints[0])
    assert shares(pool) == {"old": len(KEYS)}
    new.language.succeeded(new.language.endpoints[0])
    assert {key: pool.in_order(key)[0].name for key in KEYS} == before


async def test_a_changed_list_keeps_the_channels_that_stay() -> None:
    pool = variants(old=1, new=0)
    old = pool.all[0]
    await pool.replace(
        [VariantSpec("old", 0, old.spec.vision, old.spec.language), VariantSpec("third", 1, ("v",), ("l",))]
    )
    assert pool.all[0].language is old.language and [variant.name for variant in pool.all] == ["old", "third"]
    assert shares(pool) == {"third": len(KEYS)} and pool.main.name == "third"


@pytest.mark.parametrize(
    "text",
    [
        "a weight=1 vision=v",
        "a weight=0 vision=v lm=l",
        "a weight=-1 vision=v lm=l",
        "a weight=much vision=v lm=l",
        "a weight=1 vision=, lm=l",
        "A weight=1 vision=v lm=l",
        "a weight=1 vision=v lm=l; a weight=1 vision=w lm=m",
        "",
    ],
)
def test_what_is_no_list_of_variants_is_refused(text: str) -> None:
    with pytest.raises(LookonceError, match="variants"):
        parse_variants(text, param="variants")


def test_lists_may_be_lines_with_comments() -> None:
    one, two = parse_variants(
        "# canary\na weight=0.5 vision=v:1,v:2 lm=l:1\n\nb weight=1 vision=w lm=m # two", param="x"
    )
    assert one == VariantSpec("a", 0.5, ("v:1", "v:2"), ("l:1",)) and two.name == "b"


def ask(http: httpx2.Client, image: str) -> dict:
    body = {"questions": ["What?"], "max_tokens": 2}
    return http.post(f"/v1/images/{image}/questions", json=body).json()["answers"][0]["receipt"]


def counted(url: str) -> dict[tuple[str, str], float]:
    text = httpx2.get(f"{url}/metrics", trust_env=False).text
    found = re.findall(r'variant_requests_total\{outcome="(\w+)",variant="(\w+)"\} ([0-9.]+)', text)
    return {(variant, outcome): float(value) for outcome, variant, value in found}


def test_receipts_metrics_and_a_file_that_changes(services: Services, image_file: ImageFile, tmp_path: Path) -> None:
    """Two variants over the same services: which one answers shows in the receipt, and each image keeps its own."""
    vision, language = services.vision.address, services.language.address
    file, metrics = tmp_path / "variants", f"127.0.0.1:{free_port()}"

    def write(left: int, right: int) -> None:
        lines = (
            f"{name} weight={weight} vision={vision} lm={language}\n"
            for name, weight in (("left", left), ("right", right))
        )
        file.write_text("".join(lines))

    write(1, 1)
    with GatewayProcess("--variants-file", str(file), "--metrics-listen", metrics) as gateway, gateway.client() as http:
        assert http.get("/readyz").json()["parts"]["language"]["configured"] == 1, "the same address twice"
        images = [http.post("/v1/images", files={"file": image_file()}).json()["id"] for _ in range(12)]
        homes = {image: ask(http, image)["variant"] for image in images}
        assert set(homes.values()) == {"left", "right"}
        assert {image: ask(http, image)["variant"] for image in images} == homes
        assert all(ask(http, image)["embedding"] == "hit" for image in images)
        shared = Counter(homes.values())
        assert counted(f"http://{metrics}") == {(name, "ok"): 3.0 * count for name, count in shared.items()}
        write(0, 1)
        deadline = time.monotonic() + 30
        while {ask(http, image)["variant"] for image in images} != {"right"}:
            assert time.monotonic() < deadline, gateway.log
        file.write_text("nonsense")
        gateway.line("variants unchanged: the file is not usable")
        assert ask(http, images[0])["variant"] == "right"
        # Erasure covers what every variant made.
        assert http.delete(f"/v1/images/{images[0]}").status_code == 200
        assert http.get(f"/v1/images/{images[0]}").status_code == 404


def test_a_variant_that_nobody_serves_fails_no_request(
    services: Services, image_file: ImageFile, tmp_path: Path
) -> None:
    there = f"there weight=1 vision={services.vision.address} lm={services.language.address}"
    gone = f"gone weight=50 vision=unix:{tmp_path}/v.sock lm=unix:{tmp_path}/l.sock"
    with GatewayProcess("--variants", f"{there}; {gone}") as gateway, gateway.client() as http:
        assert http.get("/readyz").json()["status"] == "degraded"
        for _ in range(3):
            uploaded = http.post("/v1/images", files={"file": image_file()})
            assert uploaded.status_code == 200, uploaded.text
            assert ask(http, uploaded.json()["id"])["variant"] == "there"


async def test_a_change_of_the_file_that_failed_unforeseen_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.routing.variants.POLL", 0.01)
    failures = [RuntimeError("out of sockets")]

    def connect_or_fail(spec: VariantSpec) -> Variant:
        if spec.name == "b" and failures:
            raise failures.pop()
        return connect(spec)

    path = tmp_path / "variants"
    path.write_text("a weight=1 vision=v-a lm=l-a\n")
    pool = Variants(read_variants(path), connect_or_fail)
    pool.watch(path)
    path.write_text("a weight=1 vision=v-a lm=l-a\nc weight=1 vision=v-c lm=l-c\nb weight=1 vision=v-b lm=l-b\n")
    for _ in range(6000):
        if len(pool.all) == 3:
            break
        await asyncio.sleep(0.01)
    await pool.close()
    assert [variant.name for variant in pool.all] == ["a", "c", "b"] and not failures
