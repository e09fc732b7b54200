"""Threads that train models of their own, at the same time and by the same notes, get what each gets alone."""

import copy
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.runtime import replay, switches
from tests.nn.twins import randomised

STEPS = 6
TRAININGS = [("native", "prologue"), ("native", "moments"), ("reference", "prologue"), ("native", "prologue")]
"""Of each thread: its backend and its schedule; two of them go by the same notes."""


def training(number: int) -> Callable[[], list[Tensor]]:
    """Trains a model of this number, and gives its parameters and buffers."""
    name, schedule = TRAININGS[number]
    generator = torch.Generator().manual_seed(number)
    torch.manual_seed(number)
    plain = randomised(nn.Sequential(*(fusedres.nn.plain.BasicBlock(8, 8) for _ in range(2))), seed=number)
    model = fusedres.fuse(plain.to(memory_format=torch.channels_last), schedule=schedule)
    batches = [torch.randn(4, 8, 6, 6, generator=generator) for _ in range(STEPS)]

    def run() -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with fusedres.backend(name):
            for x in batches:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        return list(copy.deepcopy(model.state_dict()).values())

    return run


@pytest.fixture
def often_switched():
    """Threads take turns as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("most", [replay.MOST_NOTES, 2])
def test_each_gets_what_it_gets_alone(most, strict, often_switched, monkeypatch):
    monkeypatch.setattr(replay, "MOST_NOTES", most)
    monkeypatch.setattr(switches, "STRICT", strict)
    alone = [training(number)() for number in range(len(TRAININGS))]
    for store in (replay._notes, replay._seen, replay._unchecked):
        store.clear()
    together: dict[int, list[Tensor] | BaseException] = {}

    def on_thread(number: int, run: Callable[[], list[Tensor]]) -> None:
        try:
            together[number] = run()
        except BaseException as error:
            together[number] = error

    runs = [training(number) for number in range(len(TRAININGS))]
    threads = [threading.Thread(target=on_thread, args=one) for one in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        found = together[number]
        assert isinstance(found, list), f"training {number}: {found!r}"
        assert all(map(torch.equal, found, expected)), f"training {number}"
