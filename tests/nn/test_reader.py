"""A forward is read for what it depends on: where that changes, something else is read, or nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedres
from fusedres.nn.reader import read
from fusedres.nn.settings import Unreadable
from fusedres.nn.structured import FusedStructure
from tests.nn.twins import assert_twins, plain_copy, randomised, tensor


class Configured(nn.Module):
    """Asks an object what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(act=True, scale=2.0, callback=nn.Identity())
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        z = self.norm(self.conv(x))
        return F.relu(z) * self.config.scale if self.config.act else z


class AsksForMore(Configured):
    def forward(self, x):
        return self.config.callback(super().forward(x))


class Writes(Configured):
    def forward(self, x):
        self.config.act = False
        return self.norm(self.conv(x))


class Unmoded(Configured):
    """Changes autograd's mode on the way."""

    def forward(self, x):
        with torch.no_grad():
            z = self.conv(x)
        return F.relu(self.norm(z))


class Drawn(Configured):
    def forward(self, x):
        return self.norm(self.conv(x)) * float(torch.rand(()))


class Kept(Configured):
    """Uses a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = [torch.ones(6, 1, 1)]

    def forward(self, x):
        return self.norm(self.conv(x)) * self.table[0]


class ByClass(Configured):
    """Asks whether it is given a tensor, which what it is read with is not."""

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        return super().forward(x)


class Outer(nn.Module):
    """Too large to be tried as a whole."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        self.stem, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.body = nn.Sequential(nn.Conv2d(6, 512, 3), nn.BatchNorm2d(512), nn.Conv2d(512, 6, 3), nn.BatchNorm2d(6))

    def forward(self, x):
        z = F.relu(self.norm(self.stem(x)))
        if self.asks and not isinstance(z, torch.Tensor):
            return z
        return self.body(z) + z.mean()


class OuterByFunction(Outer):
    def forward(self, x):
        z = F.relu(self.norm(self.stem(x)))
        return self.body(z) + z.mean() if torch.is_tensor(z) else z


class OuterOfModules(Outer):
    """Asks for the class of a module."""

    def forward(self, x):
        layers = [self.stem, self.norm]
        for layer in layers:
            x = torch.add(layer(x), 1) if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return self.body(F.relu(x)) + x.mean()


OUTER = {
    "a block": ByClass,
    "a network": lambda: Outer(asks=True),
    "by is_tensor": lambda: OuterByFunction(asks=True),
    "not": lambda: Outer(asks=False),
    "of modules": lambda: OuterOfModules(asks=True),
}


@pytest.mark.parametrize("make", OUTER.values(), ids=OUTER)
def test_what_depends_on_classes_is_trusted_as_a_whole_alone(make):
    model = fusedres.fuse(nn.Sequential(randomised(make())).double())
    asks = read(model[0]).asks_for_classes
    assert asks == (not isinstance(model[0], FusedStructure))
    assert_twins(model, plain_copy(model), tensor(2, 4, 11, 12))


def test_a_reading_holds_while_its_settings_do():
    module = Configured()
    reading = read(module)
    assert [node.op for node in reading.nodes] == [
        "placeholder",
        *["call_module"] * 2,
        *["call_function"] * 2,
        "output",
    ]
    assert reading.modules_of(module) == [module, module.conv, module.norm]
    assert reading.modules_of(Configured()) is not None
    module.config.act = False
    assert reading.modules_of(module) is None
    assert len(read(module).nodes) == 4


def test_a_setting_that_changes_changes_what_runs():
    model = fusedres.fuse(nn.Sequential(randomised(Configured())).double())
    assert isinstance(model[0], FusedStructure)
    x = tensor(2, 4, 7, 6)
    for settings in ({}, {"scale": 3.0}, {"act": False}, {"act": True}):
        vars(model[0].config).update(settings)
        assert_twins(model, plain_copy(model), x)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (AsksForMore, "its forward reads self.config.callback, a Identity"),
        (Writes, "its forward sets self.config.act"),
        (Unmoded, "its forward changes autograd's or autocast's mode"),
        (Drawn, "its forward draws random numbers to decide by"),
        (Kept, "its forward reads self.table, a list"),
    ],
)
def test_what_can_not_be_read_says_why_and_changes_nothing(cls, reason):
    module = cls()
    before, drawn = dict(vars(module.config)), torch.get_rng_state()
    with pytest.raises(Unreadable, match=reason):
        read(module)
    assert vars(module.config) == before and torch.equal(torch.get_rng_state(), drawn)
