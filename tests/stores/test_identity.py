"""Identity: what makes digests differ, and one golden vector of each that must never change."""

from __future__ import annotations

import dataclasses

import pytest
from blake3 import blake3

from lookonce.core.errors import LookonceError
from lookonce.core.identity import EncoderSpec, canonical_json, embedding_key, image_digest, image_id, tenant_key

SPEC = EncoderSpec(
    vision_weights="blake3:" + "0123" * 16,
    family="qwen2_vl",
    vision_config={"depth": 2, "embed_dim": 64},
    preprocessor={"resample": 3, "image_mean": [0.5, 0.5, 0.5]},
    dtype="float32",
)


def test_golden_vectors():
    assert image_digest(b"image").hex() == "e3369d1bfc3955b917de0892e1251d46eb0a9251228dfe2b164ec13505487d1a"
    assert image_id(image_digest(b"image")) == "img_4m3j2g74hfk3sf66bcjocji5i3vqvesrekg74kywj3atkbkipuna"
    assert tenant_key("secret", "tenant").hex() == "2e33a63cb1dc92f4a4bf1cb329af84e5040af81e21b475609afe17d8aa59e320"
    assert SPEC.fingerprint() == "5015758d3812e074223305f39bde861a1b77b88297762d7b862bb3a032ce2550"
    assert (
        embedding_key(image_digest(b"image"), SPEC.fingerprint(), 3136, 1003520).hex()
        == "b897d7bff10081e0fee98b1b2f34adff26b1133665b376ff05bff38edae922b4"
    )


CHANGES = {
    "vision_weights": "blake3:" + "0124" * 16,
    "family": "qwen2_5_vl",
    "vision_config": {"depth": 3, "embed_dim": 64},
    "preprocessor": {"resample": 2, "image_mean": [0.5, 0.5, 0.5]},
    "dtype": "bfloat16",
    "quantization": "int8",
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EncoderSpec)])
def test_every_field_changes_the_fingerprint(name):
    """A new field has no change here until somebody gives it one."""
    assert dataclasses.replace(SPEC, **{name: CHANGES[name]}).fingerprint() != SPEC.fingerprint()


def test_the_order_of_settings_does_not_matter():
    turned = dataclasses.replace(SPEC, vision_config={"embed_dim": 64, "depth": 2})
    assert turned.fingerprint() == SPEC.fingerprint()


def test_numbers_are_what_they_are_however_they_are_written():
    written = dataclasses.replace(
        SPEC,
        vision_config={"depth": 2.0, "embed_dim": 64},
        preprocessor={"resample": 3, "image_mean": (0.5, 0.5, 0.5)},
    )
    assert written.fingerprint() == SPEC.fingerprint()
    assert dataclasses.replace(SPEC, vision_config={"depth": 2.5, "embed_dim": 64}).fingerprint() != SPEC.fingerprint()


def test_what_was_before_is_another_fingerprint():
    """That of version 0.3, of the same settings: an embedding of then has a key that nobody asks for now."""
    fields = dataclasses.asdict(SPEC) | {"record_schema": 2, "preprocessing": 1}
    fields["checkpoint"] = fields.pop("vision_weights")
    before = blake3(canonical_json(fields), derive_key_context="lookonce 2026 encoder fingerprint").hexdigest()
    assert before != SPEC.fingerprint()


def test_every_part_changes_the_embedding_key():
    digest, other = image_digest(b"a"), image_digest(b"b")
    keys = {
        embedding_key(digest, "f", 1, 2),
        embedding_key(other, "f", 1, 2),
        embedding_key(digest, "g", 1, 2),
        embedding_key(digest, "f", 2, 2),
        embedding_key(digest, "f", 1, 3),
        embedding_key(digest, "f", 12, 0),
    }
    assert len(keys) == 6
    assert all(len(key) == 32 for key in keys)


def test_tenants_share_nothing():
    keys = [
        tenant_key("s", "a"),
        tenant_key("s", "b"),
        tenant_key("t", "a"),
        tenant_key("sa", ""),
        tenant_key("", "sa"),
    ]
    assert len({image_digest(b"image", key) for key in keys} | {image_digest(b"image")}) == 6


def test_the_digest_covers_every_byte():
    data = bytes(100_000)
    seen = {image_digest(data)}
    for position in (0, 1, 50_000, 99_999):
        changed = bytearray(data)
        changed[position] = 1
        seen.add(image_digest(bytes(changed)))
    seen.add(image_digest(data + b"\0"))
    assert len(seen) == 6


def test_a_key_of_the_wrong_length_is_refused():
    with pytest.raises(LookonceError, match="32 bytes"):
        image_digest(b"image", b"short")


def test_image_ids_are_url_safe():
    assert image_id(bytes(32)) == "img_" + "a" * 52
