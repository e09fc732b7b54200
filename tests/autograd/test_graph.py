"""The ops that are nodes of compiled graphs: PyTorch's own checks of each, and what they refuse."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.library import opcheck
from torchvision.models import resnet

import fusedres
from fusedres import functional
from fusedres.autograd import AddAct, BNAddAct, BNPReLU, ConvChain, Dense, PreAct, StemPool
from fusedres.models import preact_resnet
from fusedres.runtime.text import value_of
from tests.nn.graphs import Graphs, OwnBlock
from tests.nn.twins import randomised

FUNCTIONS = (AddAct, BNAddAct, BNPReLU, ConvChain, Dense, PreAct, StemPool)
EVALUATED = ("evaluated_chain", "evaluated_dense", "evaluated_preact", "evaluated_stem")
OPS = [*(function.op for function in FUNCTIONS), *(f"{function.op}_backward" for function in FUNCTIONS), *EVALUATED]


def model_calls(model, *size, **options):
    """The ops of a model, trained, evaluated, and differentiated in evaluation, with their operands."""
    torch._dynamo.reset()
    graphs = Graphs()
    fused = fusedres.fuse(randomised(model), **options)
    compiled = torch.compile(fused, backend=graphs.backend, fullgraph=True)
    x = torch.randn(size).requires_grad_()
    for training in (True, False):
        fused.train(training)
        compiled(x).square().mean().backward()
    with torch.no_grad():
        compiled(x)
    return graphs.calls


def added(x, residual):
    return functional.add_act(x, residual, act="silu")


def function_calls():
    torch._dynamo.reset()
    graphs = Graphs()
    x, residual = (torch.randn(2, 8, 5, 5).requires_grad_() for _ in range(2))
    torch.compile(added, backend=graphs.backend, fullgraph=True)(x, residual).sum().backward()
    return graphs.calls


@pytest.fixture(scope="module")
def calls():
    """Op -> its calls, each another spec."""
    torch.manual_seed(0)
    projected = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    every = [
        *model_calls(nn.Sequential(resnet.Bottleneck(8, 2), resnet.BasicBlock(8, 16, 2, projected)), 2, 8, 7, 7),
        *model_calls(nn.Sequential(resnet.Bottleneck(8, 2)), 2, 8, 7, 7, schedule="moments"),
        *model_calls(preact_resnet(8, fused=False), 2, 3, 8, 8),
        *model_calls(torchvision.models.DenseNet(4, (2,), 8, num_classes=3), 2, 3, 32, 32),
        *model_calls(nn.Sequential(stem, OwnBlock()), 2, 3, 9, 9),
        *function_calls(),
    ]
    torch._dynamo.reset()
    found = {}
    for op, operands in every:
        spec = next(one for one in operands if isinstance(one, str))
        found.setdefault(op._opname, {}).setdefault(spec, (op, operands))
    return found


def cloned(operand, differentiated):
    if isinstance(operand, Tensor):
        copy = operand.detach().clone()
        return copy.requires_grad_(differentiated and copy.is_floating_point())
    return [cloned(part, differentiated) for part in operand] if isinstance(operand, list | tuple) else operand


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_what_it_declares(name, calls):
    """Its schema, its shapes on fake tensors of fixed and varying sizes, and that it can be differentiated."""
    for spec, (op, operands) in list(calls[name].items())[:2]:
        told = value_of(spec) if not name.startswith("evaluated") else None
        differentiated = told is not None and not name.endswith("_backward") and told.spec.call.differentiated
        results = opcheck(op, tuple(cloned(operand, differentiated) for operand in operands))
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def test_statistics_are_declared_to_be_moved():
    op = torch.ops.fusedres.move_statistics.default
    running, counter = [torch.zeros(3), torch.zeros(4, dtype=torch.float16)], torch.tensor(3)
    assert set(opcheck(op, (running, [counter], torch.arange(7.0))).values()) == {"SUCCESS"}
    op(running, [counter], torch.arange(7.0))
    assert running[0].tolist() == [0, 1, 2] and running[1].tolist() == [3, 4, 5, 6] and counter == 4
    assert [argument.is_write for argument in op._schema.arguments] == [True, True, False]


def test_the_rungs_differ_in_what_is_kept(calls):
    kept = {value_of(spec).spec.schedule.name for spec in calls["conv_chain"]}
    assert {"library", "moments"} <= kept


def test_a_node_that_kept_nothing_refuses_to_be_differentiated(calls):
    op, operands = next(
        call for spec, call in calls["bn_add_act"].items() if not value_of(spec).spec.call.differentiated
    )
    z, _ = op(*(cloned(operand, True) for operand in operands))
    with pytest.raises(RuntimeError, match="fusedres::bn_add_act: the graph was made for a call without gradients"):
        z.sum().backward()
    (op, operands) = next(iter(calls["evaluated_chain"].values()))
    z = op(*(cloned(operand, True) for operand in operands))
    with pytest.raises(RuntimeError, match="fusedres::evaluated_chain: a pass in evaluation keeps nothing"):
        z.sum().backward()


def test_refuses_what_it_can_not_read(calls):
    op, operands = next(iter(calls["conv_chain"].values()))
    with pytest.raises(ValueError, match="expected the text of a pass of this version of fusedres, got"):
        op(*operands[:-1], operands[-1].replace("Passing(1", "Passing(0"))
    backward, others = next(iter(calls["conv_chain_backward"].values()))
    size = [9, *others[-2][1:]]
    with pytest.raises(RuntimeError, match="its forward op has not run in this process"):
        backward(*others[:-2], size, others[-1])
