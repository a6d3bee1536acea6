"""A seal says which value of which place it is; no two of them share a digest."""

from __future__ import annotations

import itertools

from lookonce.core.identity import SEAL_BYTES, Sealer

PLACES = [(namespace, key) for namespace in ("a", "ab", "") for key in (b"", b"b", b"bc", b"c")]


def test_no_two_places_and_values_have_one_seal_however_their_bytes_are_cut():
    seals = {
        Sealer(namespace, secret).seal(key, value)[:SEAL_BYTES]
        for secret in ("", "s")
        for namespace, key in PLACES
        for value in (b"", b"c", b"bc")
    }
    assert len(seals) == 2 * len(PLACES) * 3


def test_a_value_opens_in_its_own_place_only():
    sealed = Sealer("ab", "s").seal(b"c", b"value")
    for secret, (namespace, key) in itertools.product(("", "s"), PLACES):
        opened = Sealer(namespace, secret).open(key, sealed)
        assert (opened == b"value") if (secret, namespace, key) == ("s", "ab", b"c") else opened is None
