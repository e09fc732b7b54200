"""fusedres.runtime.torch_private: each name is still there in this PyTorch, and means what we take it for."""

import ast
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.data import DataLoader

import fusedres
from fusedres.runtime import torch_private as private

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def test_every_name_has_a_test():
    assert [name for name in private.__all__ if f"test_{name}" not in globals()] == []


# A module's own dictionaries, what named tuples publish, and torchvision's classes.
ALLOWED = {
    "_modules", "_parameters", "_buffers",
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_replace", "_fields", "_asdict", "_fields_", "_DenseBlock", "_DenseLayer", "_Transition",
}  # fmt: skip


def private_names(source):
    """Names with an underscore that a file takes from elsewhere: attributes and imports."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield from {node.attr} - own - ALLOWED
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = (*node.module.split("."), *(alias.name for alias in node.names))
            yield from (name for name in names if name.startswith("_") and name not in ALLOWED)


def test_no_other_file_uses_what_pytorch_does_not_publish():
    package = Path(fusedres.__file__).parent
    found = {
        str(path.relative_to(package)): sorted(names)
        for path in package.rglob("*.py")
        if (names := set(private_names(path.read_text()))) and "kernels" not in path.parts
    }
    assert found.keys() == {"runtime/torch_private.py"}
    assert {"_current_graph_task_id", "_has_any_global_hook", "_python_dispatch"} <= set(*found.values())


class Observed(torch.autograd.Function):
    """x, with what is seen from inside of its backward pass."""

    seen = ()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dz):
        node = private.current_node()
        Observed.seen = private.in_backward(), node, private.forward_class(ctx), private.is_batch_of_gradients(dz)
        return dz


@pytest.fixture
def observed():
    x = torch.ones(3, requires_grad=True)
    z = Observed.apply(x)
    z.sum().backward()
    return z, Observed.seen


def test_in_backward(observed):
    assert observed[1][0] is True
    assert private.in_backward() is False


def test_saves_by_hooks():
    assert private.saves_by_hooks() is False
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert private.saves_by_hooks() is True
    assert private.saves_by_hooks() is False


def test_current_node(observed):
    z, (_, node, _, _) = observed
    assert node is z.grad_fn
    assert private.current_node() is None


def test_forward_class(observed):
    z, (_, _, of_context, _) = observed
    assert of_context is private.forward_class(z.grad_fn) is Observed
    assert private.forward_class((z * 2).grad_fn) is None
    assert private.forward_class(None) is None


class Cleared(torch.autograd.Function):
    """x^2, which lets go of x in its backward pass; ``freed``: whether nothing held it any more."""

    freed: bool | None = None

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dz):
        (x,) = ctx.saved_tensors
        dx, left = 2 * x * dz, weakref.ref(x)
        del x
        private.clear_saved(ctx)
        Cleared.freed = left() is None
        return dx


@pytest.mark.parametrize("retained", [False, True])
def test_clear_saved(retained):
    x = torch.ones(3, requires_grad=True)
    z = Cleared.apply(x * 3)
    z.sum().backward(retain_graph=retained)
    assert torch.equal(x.grad, torch.full((3,), 18.0)) and Cleared.freed is not retained
    if retained:
        z.sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 36.0)) and Cleared.freed is True
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_is_batch_of_gradients(observed):
    z, (_, _, _, batched) = observed
    assert batched is False
    x = torch.ones(3, requires_grad=True)
    z = Observed.apply(x)
    (grads,) = torch.autograd.grad(z, x, torch.eye(3), is_grads_batched=True)
    assert Observed.seen[-1] is True
    assert torch.equal(grads, torch.eye(3))


def test_has_hooks():
    x = torch.ones(3, requires_grad=True)
    assert not private.has_hooks(x)
    handle = x.register_hook(lambda grad: grad)
    assert private.has_hooks(x)
    handle.remove()
    assert not private.has_hooks(x)


def test_hooks_on_every_module():
    assert not private.hooks_on_every_module()
    handle = register_module_forward_hook(lambda module, args, out: None)
    assert private.hooks_on_every_module()
    handle.remove()
    assert not private.hooks_on_every_module()


def test_end_workers():
    batches = DataLoader(range(4), num_workers=1, persistent_workers=True)
    private.end_workers(batches)  # none have begun
    workers = iter(batches)._workers
    assert [worker.is_alive() for worker in workers] == [True]
    private.end_workers(batches)
    assert [worker.is_alive() for worker in workers] == [False]


def test_COMPILERS_TENSORS():
    seen = []

    @torch.compiler.allow_in_graph
    def followed(x):
        seen.append(type(x))
        return x * 2

    torch.compile(lambda x: followed(x), backend="aot_eager", fullgraph=True)(torch.ones(2))
    assert set(seen) == set(private.COMPILERS_TENSORS)


def test_constant_to_compilers():
    class Once(nn.Module):
        @private.constant_to_compilers
        def told(self):
            return len({object(): None for _ in range(3)}), torch.compiler.is_dynamo_compiling()

        def forward(self, x):
            number, seen = self.told()
            return x * number + seen

    assert torch.equal(torch.compile(Once(), backend="eager", fullgraph=True)(torch.ones(2)), torch.full((2,), 3.0))


def test_is_transformed():
    seen = []

    def looked(x):
        seen.append(private.is_transformed())
        return x * 2

    looked(torch.ones(2))
    torch.func.vmap(looked)(torch.ones(2))
    torch.func.grad(looked)(torch.tensor(1.0))
    with forward_ad.dual_level():
        looked(torch.ones(2))
    looked(torch.ones(2))
    assert seen == [False, True, True, True, False]


def test_version():
    x = torch.ones(4)
    before, view = private.version(x), x[:2]
    view.add_(1)
    assert private.version(x) == private.version(view) == before + 1
    x.data.add_(1)
    assert private.version(x) == before + 1
    with torch.inference_mode(), pytest.raises(RuntimeError, match="do not track"):
        private.version(torch.ones(1))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storage_id(device):
    x, other = torch.empty(4, device=device), torch.empty(4, device=device)
    assert private.storage_id(x) == private.storage_id(x[2:]) == private.storage_id(x.view(2, 2))
    assert private.storage_id(x) != private.storage_id(other)


def test_dispatch_keys():
    x = torch.ones(4)

    def keys(tensor):
        return private.dispatch_keys(tensor).raw_repr()

    assert keys(x) == keys(torch.zeros(2, 2))
    different = [torch._neg_view(x), torch.ones(4, device="meta"), torch.ones(4).to_sparse()]
    assert len({keys(one) for one in (x, *different)}) == 4


def test_thread_dispatch():
    before = private.thread_dispatch()
    with torch.inference_mode():
        assert private.thread_dispatch() != before
    with torch.autocast("cpu", torch.bfloat16):
        assert private.thread_dispatch() != before
    assert private.thread_dispatch() == before


class Noting(private.DispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes():
    assert private.dispatch_modes() == 0
    with Noting(), Noting():
        assert private.dispatch_modes() == 2
    assert private.dispatch_modes() == 0


def test_unseen_by_modes():
    with Noting() as noting:
        with private.unseen_by_modes():
            torch.ones(2)
        assert noting.names == []
        torch.ones(2)
    assert noting.names == ["ones"]


def test_DispatchMode():
    x = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Noting() as noting:
        z = x @ x
    assert z.dtype == torch.bfloat16 and z.requires_grad
    assert noting.names[-1] == "mm" and "_to_copy" in noting.names


def test_lerp_all():
    moved, ends = [torch.zeros(2), torch.ones(2)], [torch.ones(2), torch.zeros(2)]
    private.lerp_all(moved, ends, 0.25)
    assert torch.equal(moved[0], torch.full((2,), 0.25)) and torch.equal(moved[1], torch.full((2,), 0.75))


def test_copy_all():
    sources = [torch.rand(3, 4), torch.rand(5)]
    targets = [torch.empty_like(source, dtype=torch.float64) for source in sources]
    with Noting() as noting:
        private.copy_all(targets, sources)
    assert noting.names == ["_foreach_copy_"]
    assert all(map(torch.equal, targets, (source.double() for source in sources)))


def test_arguments_of():
    assert list(private.arguments_of(torch.ops.aten.relu_.default)) == [("self", True, False)]
    assert list(private.arguments_of(torch.ops.aten.add.out)) == [
        ("self", False, False), ("other", False, False), ("alpha", False, False), ("out", True, True),
    ]  # fmt: skip


@needs_onednn
def test_convolve():
    u, weight, shift = torch.randn(2, 4, 6, 6), torch.randn(6, 2, 3, 3), torch.randn(6)
    z = private.convolve(u, weight, shift, (1, 0), (2, 1), (1, 2), 2)
    torch.testing.assert_close(z, F.conv2d(u, weight, shift, (2, 1), (1, 0), (1, 2), 2))


@needs_onednn
def test_convolve_onto():
    u, weight, total = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 1, 1), torch.randn(2, 6, 6, 6)
    u, total = (one.contiguous(memory_format=torch.channels_last) for one in (u, total))
    expected, memory = total + F.conv2d(u, weight), total.data_ptr()
    private.convolve_onto(total, u, weight, None, (0, 0), (1, 1), (1, 1), 1)
    torch.testing.assert_close(total, expected)
    assert total.data_ptr() == memory


def test_AnyBatchNorm():
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    assert all(issubclass(norm, private.AnyBatchNorm) for norm in norms)
    assert not issubclass(nn.GroupNorm, private.AnyBatchNorm)


NEST = {"a": [1, (torch.ones(1), 2.0)], "b": None}


def test_tree_leaves():
    assert [leaf for leaf in private.tree_leaves(NEST) if leaf is not None] == [1, torch.ones(1), 2.0]


def test_tree_map_only():
    assert private.tree_map_only(float, lambda number: -number, NEST) == {"a": [1, (torch.ones(1), -2.0)], "b": None}
