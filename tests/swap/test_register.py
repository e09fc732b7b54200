"""Blocks of one's own are fused by the names of their parts, once they were seen to compute the same."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fusedres
from fusedres.swap.registry import _derived, _known
from tests.nn.twins import assert_twins, plain_copy, randomised, tensor

PAGE = Path(__file__).parents[2] / "docs" / "register.md"


@pytest.fixture(autouse=True)
def _registered_here_alone():
    fusedres.fuse(nn.Identity())
    known, derived = dict(_known), dict(_derived)
    yield
    for registry, before in ((_known, known), (_derived, derived)):
        registry.clear()
        registry.update(before)


class Unread(nn.Module):
    """A residual block whose forward decides by values."""

    def __init__(self, inputs: int = 16, channels: int = 16, stride: int = 1, act: str = "relu") -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.a_norm = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.b_norm = nn.BatchNorm2d(channels)
        self.short = nn.Sequential()
        if stride != 1 or inputs != channels:
            self.short = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.act = nn.SiLU() if act == "silu" else nn.ReLU()

    def forward(self, x):
        if x.abs().max() > 1e30:
            return x
        z = self.act(self.a_norm(self.a(x)))
        return self.act(self.b_norm(self.b(z)) + self.short(x))


class Deeper(Unread):
    """Derives and changes nothing."""


class Doubled(Unread):
    """Computes something else than it is registered for."""

    def forward(self, x):
        return 2 * super().forward(x)


CHAIN = [("a", "a_norm"), ("b", "b_norm")]
PROJECTION = ("short.0", "short.1")


def made(*blocks):
    return randomised(nn.Sequential(*blocks)).double()


def kinds(model):
    return {row.name: row for row in fusedres.report(model) if row.name in {str(i) for i in range(len(model))}}


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_registered_block_is_fused_and_computes_the_same(act):
    model = made(Unread(act=act), Deeper(16, 24, 2, act=act), Unread(24, 24, act=act))
    assert not any(row.fused for row in kinds(fusedres.fuse(model)).values())
    fusedres.unfuse(model)
    fusedres.register(Unread, chain=CHAIN, act=["act"], projection=PROJECTION)
    fusedres.fuse(model)
    assert [row.fused for row in kinds(model).values()] == [True] * 3
    assert_twins(model, plain_copy(model), tensor(2, 16, 9, 8))
    again = pickle.loads(pickle.dumps(model))
    assert [type(block) for block in again] == [type(block) for block in model]
    assert [type(block) for block in fusedres.unfuse(model)] == [Unread, Deeper, Unread]


def test_what_computes_something_else_is_left_alone_with_the_reason():
    fusedres.register(Doubled, chain=CHAIN, projection=PROJECTION)
    model = fusedres.fuse(made(Doubled()))
    (row,) = kinds(model).values()
    assert not row.fused
    assert re.match(r"its fused form differs in fp64: output 0 by ", row.reason)
    assert type(model[0]) is Doubled


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "message"),
    [
        (3, {}, TypeError, "cls: expected a class of torch.nn.Module, got 3"),
        (Unread, {"chain": []}, ValueError, "chain: expected the names of at least one convolution"),
        (Unread, {"chain": ["a"]}, ValueError, "chain: expected the names of a convolution and a batch norm, got 'a'"),
        (Unread, {"act": "tanh"}, ValueError, "act: expected None or one of"),
        (Unread, {"act": ["x", "y", "z"]}, ValueError, "act: expected 1 or 2 names of modules"),
        (Unread, {"projection": ("short",)}, ValueError, "projection: expected the names of a convolution"),
        (Unread, {"shortcut": "zero_pad"}, ValueError, "shortcut: expected 'identity' or 'none', got 'zero_pad'"),
    ],
)
def test_what_can_not_be_is_refused(cls, arguments, error, message):
    before = dict(_known)
    with pytest.raises(error, match=re.escape(message)):
        fusedres.register(cls, **{"chain": CHAIN, **arguments})
    assert _known == before


def test_a_fused_class_is_refused():
    fused = type(fusedres.fuse(fusedres.nn.BasicBlock(8, 8)))
    with pytest.raises(ValueError, match="cls: expected a plain class, got BasicBlock, which is fused"):
        fusedres.register(fused, chain=CHAIN)


def test_the_page_does_what_it_says():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, str(PAGE), "exec"), names)
    model = names["model"]
    assert [row.fused for row in kinds(model).values()] == [True, True]
    assert_twins(model.double(), plain_copy(model), tensor(2, 16, 9, 8))
