"""Whose fault it is that services die: an image's, once they died of it alone and are well with a plain one.

A service in this process that "dies" by answering as another process; test_poison.py kills real ones.
"""

from __future__ import annotations

import asyncio

import pytest

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.moderation.batch.poison_isolation import PoisonIsolation, ServiceCrashed, Suspected
from lookonce.moderation.batch.service_pool import Attempts, Patience, ServiceConnection, ServicePool

PATIENT = Patience(away=60.0)


class Service:
    """Answers an image with its name, and dies of those that `dies_of` says; `asked` holds what was under way then."""

    label, address = "vision service", "here"

    def __init__(self, dies_of=lambda image: False, lost=0):
        self.dies_of, self.lost = dies_of, lost
        self.deaths, self.under_way, self.asked = 0, [], []

    async def healthy(self):
        return True

    async def process(self, _):
        return f"process {self.deaths}"

    async def answer(self, connection, image):
        assert connection.client is self
        self.under_way.append(image)
        self.asked.append(list(self.under_way))
        try:
            await asyncio.sleep(0.005)
            if self.lost > 0:
                self.lost -= 1
                raise LookonceError(ErrorKind.UNAVAILABLE, "the network is away")
            if self.dies_of(image):
                self.deaths += 1
                raise LookonceError(ErrorKind.UNAVAILABLE, "the connection was lost")
            return image
        finally:
            self.under_way.remove(image)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("lookonce.moderation.batch.service_pool._PAUSES", (0.01, 0.05))


async def plain():
    return "plain"


def asking(service, patience=PATIENT, **options):
    """A function that asks the service about an image as a run does."""
    pool = ServicePool([ServiceConnection(service, patience, service.process)])
    isolation = PoisonIsolation(**options)
    return lambda image: isolation.run(pool, service.answer, image, plain, Attempts(patience))


async def test_an_image_that_kills_is_tried_alone_and_blamed_and_others_are_answered():
    service = Service(lambda image: image == "poison")
    ask, others = asking(service), [f"image {n}" for n in range(200)]
    going = iter(others)

    async def worker():
        return [await ask(image) for image in going]

    *answered, poison = await asyncio.gather(*(worker() for _ in range(4)), ask("poison"), return_exceptions=True)
    assert sorted(name for names in answered for name in names) == sorted(others)
    assert isinstance(poison, ServiceCrashed) and str(poison).startswith("the vision service died twice")
    trials = [under_way for under_way in service.asked if under_way[-1] == "poison"]
    assert service.deaths == 5 and [len(under_way) for under_way in trials[-2:]] == [1, 1]
    assert ["plain"] in service.asked


async def test_a_service_that_dies_of_everything_is_no_images_fault():
    service = Service(lambda image: True)
    with pytest.raises(LookonceError) as caught:
        await asking(service, Patience(away=1.0))("image")
    assert caught.value.kind is ErrorKind.UNAVAILABLE and "did not answer for 1 s" in caught.value.message
    assert ["plain"] in service.asked


async def test_connections_lost_without_a_death_prove_nothing():
    service = Service(lost=6)
    assert await asking(service)("image") == "image"
    assert ["plain"] not in service.asked


async def test_where_others_ask_the_same_services_it_is_left_to_another_process():
    service = Service(lambda image: True)
    with pytest.raises(Suspected):
        await asking(service, trials=False)("image")
    assert service.deaths == 3
