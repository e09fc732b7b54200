"""fusedres.swap.swap: only the class of a block changes, and it changes back."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fusedres
from fusedres.nn.fused import Fused
from fusedres.patterns.choose import AUTO
from fusedres.plan.schedule import SCHEDULES
from tests.comparison import relative_error
from tests.nn.twins import (
    assert_same_pass,
    assert_twins,
    assert_unchanged,
    plain_copy,
    randomised,
    run,
    snapshot,
    tensor,
)

IMAGES = (4, 3, 32, 32)


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def candidates(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(row.name) for row in fusedres.report(model)]


def attributes(model: nn.Module) -> dict[str, list[str]]:
    return {name: list(vars(module)) for name, module in model.named_modules()}


def test_fuse_changes_classes_and_nothing_else(small):
    before, was, had = snapshot(small), classes(small), attributes(small)
    state = {name: value.clone() for name, value in small.state_dict().items()}
    assert fusedres.fuse(small) is small
    assert_unchanged(small, before)
    assert list(small.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    swapped = candidates(small)
    assert len(swapped) >= 3
    for name, module in small.named_modules():
        assert isinstance(module, was[name])
        assert (type(module) is not was[name]) == isinstance(module, Fused) == (module in swapped)

    assert fusedres.unfuse(small) is small
    assert classes(small) == was
    assert attributes(small) == had, "unfuse left something on the modules"
    assert_unchanged(small, before)


@pytest.mark.parametrize("schedule", [AUTO, *SCHEDULES])
def test_a_fused_model_computes_what_it_computed(small, schedule):
    plain = copy.deepcopy(randomised(small))
    fused = fusedres.fuse(small, schedule=schedule)
    assert all(row.fused for row in fusedres.report(fused))
    # Rounding grows from block to block, more so where few values make a statistic.
    assert_twins(fused, plain, tensor(*IMAGES), tensor(*IMAGES, seed=2), tolerance=1e-8)
    assert_twins(fused.eval(), plain.eval(), tensor(*IMAGES, seed=3), tolerance=1e-8)
    fusedres.unfuse(fused).train()
    plain.train().load_state_dict(fused.state_dict())
    ours, theirs = run(fused, tensor(*IMAGES)), run(plain, tensor(*IMAGES))
    assert torch.equal(ours.z, theirs.z) and torch.equal(ours.dx, theirs.dx), "unfused is not the plain model"


def test_training_can_change_over_in_the_middle(small):
    """An optimizer made before fuse goes on, its momentum included; unfuse in the middle is as good."""
    plain = copy.deepcopy(small)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in (small, plain)]
    targets = torch.randint(0, 5, (4,), generator=torch.Generator().manual_seed(0))
    for step, change in enumerate([None, fusedres.fuse, None, fusedres.unfuse, fusedres.fuse]):
        if change:
            change(small)
        for model, optimizer in zip((small, plain), optimizers, strict=True):
            optimizer.zero_grad()
            logits = model(tensor(*IMAGES, seed=step)).flatten(1)[:, :5]
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
    for (name, ours), theirs in zip(small.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_state_dicts_fit_both_ways(small):
    plain = copy.deepcopy(small)
    fused = fusedres.fuse(randomised(small))
    assert str(plain.load_state_dict(fused.state_dict())) == "<All keys matched successfully>"
    assert_twins(fused.eval(), plain.eval(), tensor(*IMAGES), tolerance=1e-8)
    other = randomised(copy.deepcopy(plain), seed=5)
    assert str(fused.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert_twins(fused.eval(), other.eval(), tensor(*IMAGES), tolerance=1e-8)


def test_state_dict_can_be_assigned(small):
    """``assign=True`` replaces the tensors themselves."""
    fused = fusedres.fuse(small).eval()
    fused(tensor(*IMAGES))
    other = randomised(plain_copy(small), seed=5)
    fused.load_state_dict(other.state_dict(), assign=True)
    assert_twins(fused, other.eval(), tensor(*IMAGES), tolerance=1e-8)


def copied_by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def copied_by_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copied_by_pickle, copied_by_save])
def test_a_fused_model_can_be_copied(small, duplicate):
    fused = fusedres.fuse(small, schedule="prologue")
    twin = duplicate(fused)
    assert classes(twin) == classes(fused)
    assert [row.schedule for row in fusedres.report(twin)] == [row.schedule for row in fusedres.report(fused)]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in fused.parameters()}
    before = snapshot(fused)
    ours = run(twin, tensor(*IMAGES))
    twin.zero_grad()
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert_unchanged(fused, before)
    theirs = run(fused, tensor(*IMAGES))
    assert torch.equal(ours.z, theirs.z)
    assert all(torch.equal(ours.grads[name], theirs.grads[name]) for name in theirs.grads)


LOADER = """
import sys, torch
assert not any(name.split(".")[0] in ("fusedres", "torchvision") for name in sys.modules)
models, x, expected = torch.load(sys.argv[1], weights_only=False)
for model, z in zip(models, expected):
    assert torch.equal(model(x), z), type(model)
import fusedres
print([sum(row.fused for row in fusedres.report(model)) for model in models])
print([type(fusedres.unfuse(model)).__module__ for model in models])
"""


def test_saved_whole_and_loaded_where_nothing_is_imported(tmp_path, resnet):
    """A process that imports torch alone can load the file: pickle finds the classes by name."""
    models = [resnet.eval(), fusedres.nn.Bottleneck(3, 4).double().eval()]
    for model in models:  # which auto would leave to the plain modules there
        fusedres.fuse(model, schedule="block_end")
    x = tensor(*IMAGES)
    with torch.no_grad():
        expected = [model(x) for model in models]
    for model, z in zip(models, expected, strict=True):
        z.copy_(model(x).detach())
    torch.save((models, x, expected), tmp_path / "models.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "models.pt")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[3, 1]", "['torchvision.models.resnet', 'fusedres.nn.plain.residual']"]


def test_weights_alone_load_safely(tmp_path, small):
    torch.save(fusedres.fuse(small).state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert str(fusedres.unfuse(small).load_state_dict(state)) == "<All keys matched successfully>"


def test_fuse_twice_changes_only_the_schedule(small):
    fusedres.fuse(small, schedule="stats")
    before, was = snapshot(small), classes(small)
    fusedres.fuse(small, schedule="stats")
    assert classes(small) == was
    fusedres.fuse(small, schedule="moments")
    assert classes(small) == was
    assert {row.schedule for row in fusedres.report(small)} == {"moments"}
    fusedres.fuse(small)
    assert {row.schedule for row in fusedres.report(small)} == {AUTO}
    assert_unchanged(small, before)


def test_parts_of_a_model_can_have_schedules_of_their_own(resnet):
    fusedres.fuse(resnet, schedule="stats")
    fusedres.fuse(resnet.layer1, schedule="moments")
    fusedres.unfuse(resnet.layer2)
    rows = {row.name: row.schedule for row in fusedres.report(resnet)}
    assert rows == {"": "stats", "layer1.0": "moments", "layer2.0": None}
    assert_twins(resnet, plain_copy(resnet), tensor(*IMAGES), tolerance=1e-8)


def test_unfusing_a_plain_model_changes_nothing(small):
    before, was, had = snapshot(small), classes(small), attributes(small)
    assert fusedres.unfuse(small) is small
    assert (classes(small), attributes(small)) == (was, had)
    assert_unchanged(small, before)


@pytest.mark.parametrize("model", [nn.Linear(2, 3), nn.Sequential(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())])
def test_a_model_without_candidates_is_left_alone(model):
    was = classes(model)
    assert fusedres.unfuse(fusedres.fuse(model)) is model
    assert classes(model) == was
    assert len(fusedres.report(model)) == 0


def test_the_model_may_itself_be_a_block():
    block = fusedres.nn.plain.Bottleneck(3, 4).double()
    plain = copy.deepcopy(block)
    assert type(fusedres.fuse(block)) is fusedres.nn.Bottleneck
    (row,) = fusedres.report(block)
    assert (row.name, row.kind, row.fused) == ("", "Bottleneck", True)
    assert_twins(block, plain, tensor(2, 3, 6, 5))
    assert type(fusedres.unfuse(block)) is fusedres.nn.plain.Bottleneck


def assert_same_gradients(actual: nn.Module, expected: nn.Module) -> None:
    for (name, ours), theirs in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_two_batches_before_one_backward_pass(small):
    """As with two views of a batch, real and generated images, or a loss over several crops."""
    plain = copy.deepcopy(small)
    for model in (fusedres.fuse(small), plain):
        (model(tensor(*IMAGES)).square().mean() + model(tensor(*IMAGES, seed=2)).square().mean()).backward()
    assert_same_gradients(small, plain)
    for ours, theirs in zip(small.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_other_passes_between_forward_and_backward(small):
    """A validation pass, or one that only moves the statistics, while a training graph is alive."""
    plain = copy.deepcopy(small)
    for model in (fusedres.fuse(small), plain):
        loss = model(tensor(*IMAGES)).square().mean()
        with torch.no_grad():
            model.eval()(tensor(*IMAGES, seed=2))
            model.train()(tensor(*IMAGES, seed=3))
        loss.backward()
    assert_same_gradients(small, plain)


def test_a_weight_written_before_the_backward_pass_is_an_error_as_in_eager(small):
    """The gradient would be of other weights."""
    for model in (fusedres.fuse(small), plain_copy(small)):
        loss = model(tensor(*IMAGES)).square().mean()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_block_used_twice():
    block = fusedres.nn.plain.BasicBlock(6, 6)
    model = nn.Sequential(block, block).double()
    plain = copy.deepcopy(model)
    assert_twins(fusedres.fuse(model), plain, tensor(2, 6, 5, 4))


def test_the_projects_blocks_are_fused_from_the_start_and_unfuse_to_plain_ones():
    block = fusedres.nn.BasicBlock(4, 6, 2)
    assert [row.schedule for row in fusedres.report(block)] == [AUTO]
    assert isinstance(block, fusedres.nn.plain.BasicBlock)
    assert type(fusedres.unfuse(block)) is fusedres.nn.plain.BasicBlock
    assert type(fusedres.fuse(block)) is fusedres.nn.BasicBlock


@pytest.mark.parametrize("model", [None, 3, "resnet18", nn.Linear, [nn.Linear(1, 1)]], ids=repr)
@pytest.mark.parametrize("function", [fusedres.fuse, fusedres.unfuse, fusedres.report])
def test_what_is_no_module_is_refused(function, model):
    with pytest.raises(TypeError, match=rf"model: expected a torch.nn.Module, got {type(model).__name__}"):
        function(model)


@pytest.mark.parametrize("schedule", ["fastest", "", "MOMENTS", None, 1, ["moments"]], ids=repr)
@pytest.mark.parametrize("already", [False, True], ids=["plain", "fused"])
def test_an_unknown_schedule_is_refused_and_nothing_changed(small, schedule, already):
    if already:
        fusedres.fuse(small, schedule="stats")
    was, had, before = classes(small), attributes(small), snapshot(small)
    with pytest.raises((ValueError, TypeError), match=r"schedule: expected one of .*'auto'.*'moments'"):
        fusedres.fuse(small, schedule=schedule)
    assert (classes(small), attributes(small)) == (was, had)
    assert_unchanged(small, before)


def test_schedule_is_given_by_name(small):
    with pytest.raises(TypeError):
        fusedres.fuse(small, "moments")
    assert not any(row.fused for row in fusedres.report(small))


def test_modes_and_gradients_stay(small):
    """What a user froze or put into eval stays so."""
    frozen = next(small.parameters())
    frozen.requires_grad_(False)
    norms = [module for module in small.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[1].eval()
    plain = copy.deepcopy(small)
    fusedres.fuse(small)
    assert not norms[1].training and norms[0].training and not frozen.requires_grad
    assert_same_pass(run(small, tensor(*IMAGES)), run(plain, tensor(*IMAGES)), 1e-8)


def nodes(model: nn.Module) -> set[str]:
    """The names of what autograd goes back through."""
    waiting, seen = [model(torch.randn(2, 3, 32, 32)).grad_fn], {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return {type(node).__name__ for node in seen - {None}}


NETWORKS = ["resnet18", "cifar_resnet20", "preact_resnet110", "densenet121", "resnet110_bn_after_add"]


@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_gpu_without_matrix_units_auto_is_the_plain_model(name, monkeypatch):
    model = fusedres.models.create(name)
    fused = nodes(model)
    monkeypatch.setattr("fusedres.nn.fused.left_to_library", lambda _: True)
    assert nodes(model) == nodes(plain_copy(model)) != fused
    assert nodes(fusedres.fuse(model, schedule="stats")) >= fused - {"GlobalPoolBackward", "ViewBackward0"}


# --- what people do with models ---


def as_half(vector: torch.Tensor) -> torch.Tensor:
    """The same numbers, every other in memory."""
    return torch.stack([vector, torch.full_like(vector, 99.0)], 1)[:, 0]


@pytest.mark.parametrize("schedule", [AUTO, *SCHEDULES])
def test_vectors_need_not_be_contiguous(resnet, schedule):
    randomised(resnet)
    plain = run(copy.deepcopy(resnet), tensor(*IMAGES))
    for part in resnet.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data, part.bias.data = as_half(part.weight.data), as_half(part.bias.data)
            part.running_mean, part.running_var = as_half(part.running_mean), as_half(part.running_var)
    fused = fusedres.fuse(resnet, schedule=schedule)
    assert_same_pass(run(copy.deepcopy(fused), tensor(*IMAGES)), plain)
    spread = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: as_half(t) if t.dim() == 1 else t)
    with spread:
        assert_same_pass(run(fused, tensor(*IMAGES)), plain)


def by_number(conv: nn.Conv2d) -> None:
    conv.stride, conv.padding, conv.dilation = 2, 2, 2


def by_lists(conv: nn.Conv2d) -> None:
    conv.stride, conv.padding, conv.dilation = [1, 2], [2, 1], [2, 1]


@pytest.mark.parametrize("change", [by_number, by_lists])
def test_windows_of_a_live_model_change_as_pytorch_takes_them(change):
    model = randomised(nn.Sequential(plain_copy(fusedres.nn.ConvBNAct(3, 8)))).double()
    fused = fusedres.fuse(copy.deepcopy(model))
    for one in (model, fused):
        change(one[0].conv)
    assert_twins(fused, model, *[tensor(*IMAGES)] * 3)


def test_an_empty_batch_in_training(small):
    fused = fusedres.fuse(copy.deepcopy(small))
    for model in (fused, small):
        x = tensor(0, *IMAGES[1:]).requires_grad_()
        z = model(x)
        z.sum().backward()
        assert z.shape[0] == 0 and x.grad.shape == x.shape


def test_hooks_for_all_modules_see_them_all(resnet):
    seen = []
    fused = fusedres.fuse(copy.deepcopy(resnet))
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        fused(tensor(*IMAGES))
        ours = len(seen)
        resnet(tensor(*IMAGES))
    finally:
        handle.remove()
    assert ours == len(seen) - ours > 10


@pytest.mark.parametrize("training", [True, False])
def test_flops_are_counted(resnet, training):
    counted = []
    for model in (resnet.float().train(training), fusedres.fuse(copy.deepcopy(resnet))):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            model(tensor(*IMAGES).float())
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_forward_derivatives_are_those_of_the_plain_model(resnet):
    fused, x = fusedres.fuse(copy.deepcopy(resnet)).eval(), tensor(*IMAGES)
    tangents = []
    for model in (fused, resnet.eval()):
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            z = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(z).tangent)
    torch.testing.assert_close(*tangents)


def test_transforms_of_functions_are_those_of_the_plain_model(resnet):
    fused, x = fusedres.fuse(copy.deepcopy(resnet)).eval(), tensor(*IMAGES)
    mapped, gradients = [], []
    for model in (fused, resnet.eval()):
        parameters = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in model.named_parameters()}

        def called(state, x, model=model):
            return torch.func.functional_call(model, state, (x,))

        mapped.append(torch.vmap(called, (0, None))(parameters, x))
        one = {name: p.detach() for name, p in model.named_parameters()}
        gradients.append(torch.func.grad(lambda state, called=called: called(state, x).sum())(one)["conv1.weight"])
    torch.testing.assert_close(*mapped)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batches_of_gradients(small, create_graph):
    x, found = tensor(*IMAGES), []
    for model in (small, fusedres.fuse(copy.deepcopy(small))):
        z = model(x)
        parameters, dz = list(model.parameters()), tensor(3, *z.shape)
        found.append(torch.autograd.grad(z, parameters, dz, is_grads_batched=True, create_graph=create_graph))
        assert found[-1][0].requires_grad is create_graph
    largest = max(float(grad.norm()) for grad in found[0])
    for theirs, ours in zip(*found, strict=True):
        assert relative_error(ours, theirs, max(float(theirs.norm()), 1e-3 * largest)) <= 1e-10


def test_models_run_without_memory(resnet):
    fused = fusedres.fuse(resnet.float()).eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert fused(mode.from_tensor(tensor(*IMAGES).float())).shape == (IMAGES[0], 5)


@pytest.mark.parametrize("way", ["module's hook", "tensor's hook", "retain_grad"])
def test_gradients_that_are_shown_are_written_out(resnet, way):
    def shown(model):
        found = []

        def after(_, __, z):
            if way == "retain_grad":
                z.retain_grad()
                found.append(z)
            else:
                z.register_hook(lambda g: found.append(g.clone()) or g.mul_(2))

        if way == "module's hook":
            model.layer2.register_full_backward_hook(lambda _, __, given: found.append(given[0]))
        else:
            model.layer2.register_forward_hook(after)
        weight = run(model, tensor(*IMAGES)).grads["conv1.weight"]
        (one,) = found
        gradient = one.grad if way == "retain_grad" else one
        assert 0 not in gradient.stride()
        return gradient, weight

    torch.testing.assert_close(shown(fusedres.fuse(copy.deepcopy(resnet))), shown(resnet))


@pytest.mark.parametrize("training", [True, False])
def test_autocast_gives_blocks_the_dtype_of_plain_ones(small, training):
    """Of an input in fp32 too: torchvision adds the shortcut in place, the project's blocks do not."""
    fused = fusedres.fuse(copy.deepcopy(small.float().train(training)))
    for plain, ours in zip(small.modules(), fused.modules(), strict=True):
        if type(plain).__name__ in ("BasicBlock", "Bottleneck"):
            given = torch.randn(2, plain.conv1.in_channels, 8, 8)
            with torch.autocast("cpu", torch.bfloat16):
                z, theirs = ours(given), plain(given)
            assert z.dtype == theirs.dtype
            torch.testing.assert_close(z, theirs, rtol=0.05, atol=0.05)
