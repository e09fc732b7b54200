"""fusedres.swap.account: every batch norm is in the pass of a module, or has a reason why it is in none."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fusedres
from fusedres.nn import structured
from fusedres.runtime import switches
from fusedres.swap.rehearsal import stand_in
from tests.nn.twins import assert_twins, tensor
from tests.swap.changes import replaced

NOT_YET = "not fused yet: call fusedres.fuse(model)"


class Layer(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class TakesAll(Layer):
    def forward(self, *xs):
        return super().forward(xs[0])


class CallsTwice(Layer):
    def forward(self, x):
        return self.bn(self.conv(self.bn(x)))


class CallsNot(Layer):
    def forward(self, x):
        return self.conv(x)


class Weighs(Layer):
    """Which uses the tensors of its batch norm without a call of it."""

    def forward(self, x):
        return self.conv(x) * self.bn.weight[:, None, None]


class Beside(nn.Module):
    """Two chains of which neither takes what the other gives."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Layer(), Layer()

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], 1)


def left(model: nn.Module) -> dict[str, str]:
    return {norm.name: norm.reason for norm in fusedres.report(model).norms if norm.where is None}


REASONS = {
    "takes *args": (
        TakesAll,
        "TakesAll can not be read: its forward takes *xs; "
        "fusedres.register(TakesAll, ...) lets you say what it computes",
    ),
    "called twice": (CallsTwice, "the forward of 1 (CallsTwice) calls it more than once, or with more than a tensor"),
    "never called": (CallsNot, "the forward of 1 (CallsNot) does not call it"),
    "its weight alone": (Weighs, "the forward of 1 (Weighs) does not call it"),
}


@pytest.mark.parametrize(("kind", "reason"), REASONS.values(), ids=REASONS)
def test_why_a_batch_norm_is_in_no_pass(kind, reason):
    model = nn.Sequential(Layer(), kind()).double()
    plain = copy.deepcopy(model)
    assert left(model) == {"0.bn": NOT_YET, "1.bn": reason}
    report = fusedres.report(fusedres.fuse(model))
    assert left(model) == {"1.bn": reason} and report.norms_fused == (1, 2)
    assert [(row.name, row.fused, row.reason, row.norms) for row in report] == [
        (report.norms[0].where, True, "", 1), ("1", False, reason, 0),
    ]  # fmt: skip
    assert_twins(model, plain, tensor(2, 4, 6, 5))


def test_a_form_that_differs_is_told(monkeypatch):
    class Unlucky(Layer):
        pass

    monkeypatch.setattr(structured, "prove", lambda *_: "its fused form differs in fp64")
    model = nn.Sequential(Unlucky(), nn.Flatten())
    with pytest.warns(UserWarning, match="its fused form differs in fp64"):
        fusedres.fuse(model)
    assert left(model) == {"0.bn": "0 (Unlucky): its fused form differs in fp64"}


def test_a_pass_counts_where_it_is_run():
    """Chains that go through modules belong to the module around them, which alone has a row."""
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = fusedres.fuse(nn.Sequential(inner, nn.ReLU(), Beside()))
    report = fusedres.report(model)
    assert [(row.name, row.norms) for row in report] == [("", 1), ("2.left", 1), ("2.right", 1)]
    assert {norm.name: norm.where for norm in report.norms} == {
        "0.1": "", "2.left.bn": "2.left", "2.right.bn": "2.right",
    }  # fmt: skip
    assert sum(row.norms for row in report) == report.norms_fused[0]


def test_a_module_that_is_partly_fused_says_so():
    class Both(Beside):
        def forward(self, x):
            return self.left.bn(self.left.conv(x)).relu().sigmoid() + self.right.bn(self.right.conv(x)).tanh()

    model = fusedres.fuse(Both())
    assert fusedres.report(model)[0].note == ""
    model.right.conv.register_forward_hook(lambda *_: None)
    row = fusedres.report(model)[0]
    assert (row.fused, row.norms) == (True, 1)
    assert row.note == "1 of 2 passes not taken: right.conv has hooks, which a fused pass would not call"
    assert left(model) == {"right.bn": "right (Layer): conv has hooks, which a fused pass would not call"}


def test_what_was_changed_after_fuse_is_to_be_fused_again(resnet):
    fusedres.fuse(resnet)
    replaced("relu", lambda _: nn.CELU())(resnet.layer2[0])
    again = "relu is a CELU, which no fused pass computes; call fusedres.fuse(model) again"
    names = [f"layer2.0.{name}" for name in ("bn1", "bn2", "bn3", "downsample.1")]
    assert left(resnet) == dict.fromkeys(names, again)
    fusedres.fuse(resnet)
    assert not left(resnet)


def test_what_holds_for_all(resnet, monkeypatch):
    fusedres.fuse(resnet)
    resnet.layer1.compile()
    assert not left(resnet)
    monkeypatch.setattr(switches, "DISABLED", True)
    report = fusedres.report(resnet)
    assert report.norms_fused == (0, 9)
    assert {norm.reason for norm in report.norms} == {"FUSEDRES_DISABLE is set"}


def test_a_report_changes_nothing(resnet):
    resnet.layer2[0].conv1.register_forward_hook(lambda *_: None)
    before = [(type(module), dict(module.__dict__)) for module in resnet.modules()]
    assert fusedres.report(resnet).norms_fused == (0, 9)
    assert [(type(module), module.__dict__) for module in resnet.modules()] == before


def test_a_stand_in_shares_tensors_and_is_joined_alike():
    shared = Layer()
    model = nn.Sequential(shared, torch.jit.script(nn.ReLU()), shared)
    twin = stand_in(model)
    assert twin is not model and twin[0] is twin[2] is not shared and twin[1] is model[1]
    assert [id(each) for each in twin.parameters()] == [id(each) for each in model.parameters()]
    fusedres.fuse(twin)
    assert type(model[0]) is Layer and type(twin[0]) is not Layer and "fused_schedule" not in shared.__dict__


def test_fuse_warns_where_it_fuses_nothing():
    model = nn.Sequential(TakesAll(), CallsNot())
    with pytest.warns(UserWarning) as caught:
        assert fusedres.fuse(model) is model
    (warning,) = caught
    assert str(warning.message) == (
        f"fusedres.fuse: nothing of Sequential is fused: 0.bn: {REASONS['takes *args'][1]}; "
        "fusedres.report(model) says more"
    )
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(4)),
        nn.Sequential(TakesAll(), Layer()),
    ],
    ids=["no batch norm", "no convolution", "none of images", "something fused"],
)
def test_fuse_says_nothing_where_nothing_was_to_be_fused_or_something_is(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedres.fuse(model)
