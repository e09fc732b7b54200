"""fusedres.traffic.weigh and predict: which of several ways is predicted to be fastest."""

import pytest
import torch

import fusedres
from fusedres.operands import ConvInput, Geometry
from fusedres.ops.bn_act import bn_act
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.op import Op
from fusedres.plan.gpus import GPUS, assume_gpu
from fusedres.runtime.launch import wants_kernels
from fusedres.traffic.predict import predicted, watching
from fusedres.traffic.weigh import described, fastest, forget, on_meta

X = torch.empty(64, 64, 56, 56, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
V = torch.empty(64, device="meta")


def once(x):
    return x + 1


def twice(x):
    return x + 1 + 1


def never(x):
    return NotImplemented


@pytest.fixture(autouse=True)
def anew():
    forget()
    yield
    forget()


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ({"twice": twice, "once": once}, "once"),
        ({"once": once, "twice": twice}, "once"),
        ({"never": never, "twice": twice}, "twice"),
        ({"first": once, "second": once}, "first"),
    ],
)
def test_what_takes_least_time(ways, expected):
    with fusedres.record(), assume_gpu(GPUS["h100"]):
        assert fastest("sum", ways, X) == expected


def test_who_asks_for_kernels_takes_the_first_way():
    with fusedres.record(), fusedres.backend("triton"):
        assert fastest("sum", {"twice": twice, "once": once}, X) == "twice"


def test_it_is_decided_once_for_operands_of_a_kind():
    calls = []

    def counted(x):
        calls.append(tuple(x.shape))
        return x + 1

    ways = {"counted": counted, "twice": twice}
    with fusedres.record(), assume_gpu(GPUS["h100"]):
        for x in (X, X.clone(), X[:32]):
            fastest("sum", ways, x)
        with assume_gpu(GPUS["a100"]):
            fastest("sum", ways, X)
    assert calls == [tuple(X.shape), (32, 64, 56, 56), tuple(X.shape)]


def test_operands_on_paper():
    wide = torch.empty(2, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    u = ConvInput(wide[:, :4], torch.ones(4, requires_grad=True), torch.ones(4))
    paper = on_meta((u, Geometry(), [1, u.tensor]))
    assert paper[0].tensor.is_meta
    assert paper[0].tensor.stride() == u.tensor.stride()
    assert paper[0].scale.requires_grad and not paper[0].shift.requires_grad
    assert paper[1] == Geometry()
    assert described((u, Geometry())) == described(on_meta((u, Geometry())))
    assert described((u, Geometry())) != described((u._replace(scale=None), Geometry()))


def test_a_library_runs_an_op_where_its_call_is_faster():
    """A convolution whose kernel takes three passes."""

    def plain(x):
        return x + 1

    op = Op(plain, weighed=True)
    ran = []

    @op.triton
    def _(x):
        ran.append("kernels")
        return bn_act(x, V, V)[0]

    @op.native
    def _(x):
        ran.append("library")
        return x + 1

    assert not wants_kernels(X)
    with fusedres.record(), assume_gpu(GPUS["h100"]):
        op(X)
        assert ran[:2] == ["kernels", "library"]  # both on paper
        chosen = ran[2:]
        assert chosen in (["kernels"], ["library"])
        op(X)
        assert ran[3:] == chosen
    with fusedres.record(), fusedres.backend("triton"):
        op(X)
    assert ran[4:] == ["kernels"]


def test_every_launch_that_is_weighed_can_be_watched():
    weight = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="meta")
    with fusedres.record() as trace, watching() as seen, assume_gpu(GPUS["h100"]):
        conv_forward(ConvInput(X), weight, Geometry(padding=(1, 1)), statistics=True)
    names = {one.name for one in seen}
    assert {"conv_forward_kernel", "bn_statistics_kernel"} <= names
    assert len(trace.launches) == 1


def test_what_a_pass_raises_is_raised():
    def fails():
        raise ValueError("of the pass")

    with pytest.raises(ValueError, match="of the pass"):
        predicted(fails, GPUS["h100"])
