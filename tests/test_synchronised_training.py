"""Synchronised batch norms in fused passes, as people train with them: wrappers, checkpoints, accumulation, faults."""

import contextlib
import functools
import os
import sys
import time
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.nn import plain
from fusedres.runtime import collectives
from tests.synchronised import Others, batch, counting, in_group, in_processes, leave, norms_of, synchronised

SIZES = (2, 3)
STEPS = 3


class Network(nn.Module):
    """Two residual blocks, one of them with a projection, and a layer that nobody calls."""

    def __init__(self, checkpoints: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(plain.BasicBlock(3, 4, 2), plain.BasicBlock(4, 4))
        self.head = nn.Linear(4, 3)
        self.reentrant = checkpoints

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def network(checkpoints: bool | None = None, *, unused: bool = False, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = Network(checkpoints).double()
    if unused:
        model.unused = nn.Linear(2, 2).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, value in settings.items():
                setattr(module, name, value)
    return model


def trained(model: nn.Module, rank: int, *, parts: int = 1, paused=contextlib.nullcontext) -> dict:
    """What a model has become after some steps, each of ``parts`` batches whose gradients are added up."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    share = slice(None) if rank < 0 else slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    outputs = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            x, dz = (tensor[share] for tensor in batch(STEPS * part + step, sum(SIZES), torch.float64))
            with paused() if part < parts - 1 else contextlib.nullcontext():
                # Reentrant checkpointing gives gradients where its input asks for one.
                z = model(x.requires_grad_())
                outputs.append(z.detach())
                # Wrappers take the mean of the processes' gradients.
                (z.backward(dz[:, :3]) if rank >= 0 else (z / len(SIZES)).backward(dz[:, :3]))
        optimizer.step()
    return {"outputs": torch.cat(outputs), **{name: _whole(value) for name, value in model.state_dict().items()}}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def ddp(model: nn.Module, **options) -> nn.Module:
    # It refuses SyncBatchNorm on a CPU, where PyTorch has none, but only as it is built.
    return synchronised(nn.parallel.DistributedDataParallel(model, **options))


def fully_sharded(model: nn.Module, *, blocks: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks if blocks else ():
        fully_shard(block)
    return fully_shard(model)


def fsdp(model: nn.Module, *, original: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({plain.BasicBlock}), use_orig_params=original,
        device_id=torch.device("cpu"),
    )  # fmt: skip


def state_of(model: nn.Module, found: dict) -> dict:
    """Names and tensors of the model inside of a wrapper."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            whole = {name: value.clone() for name, value in model.state_dict().items()}
        found = {"outputs": found["outputs"], **whole}
    return {name.replace("module.", "").replace("_fsdp_wrapped_", ""): value for name, value in found.items()}


WRAPPERS = {
    "DDP": ddp,
    "DDP, static graph": functools.partial(ddp, static_graph=True),
    "DDP, unused parameters": functools.partial(ddp, find_unused_parameters=True),
    "DDP, gradients as views": functools.partial(ddp, gradient_as_bucket_view=True),
    "fully_shard": functools.partial(fully_sharded, blocks=True),
    "fully_shard, as a whole": functools.partial(fully_sharded, blocks=False),
    "FSDP": functools.partial(fsdp, original=False),
    "FSDP, original parameters": functools.partial(fsdp, original=True),
}
# What runs in one process for each, by the arguments of `network`, and how many batches make a step.
ALONE = {
    **{how: ({"unused": how == "DDP, unused parameters"}, 1) for how in WRAPPERS},
    "fused last": ({}, 1),
    "no_sync": ({}, 2),
    "reentrant checkpoints": ({}, 1),
    "checkpoints": ({}, 1),
    "checkpoints, fully_shard": ({}, 1),
    "momentum None": ({"momentum": None}, 1),
    "no running statistics": (
        {"track_running_stats": False, "running_mean": None, "running_var": None, "num_batches_tracked": None}, 1
    ),
}  # fmt: skip


def made(how: str) -> nn.Module:
    settings, _ = ALONE[how]
    reentrant = {"reentrant checkpoints": True, "checkpoints": False, "checkpoints, fully_shard": False}.get(how)
    model, wrapper = network(reentrant, **settings), WRAPPERS.get(how, ddp)
    if "fully_shard" in how:
        return (wrapper if how in WRAPPERS else WRAPPERS["fully_shard"])(fusedres.fuse(synchronised(model)))
    if how == "fused last":
        return fusedres.fuse(ddp(model))
    return wrapper(fusedres.fuse(synchronised(model) if "FSDP" in how else model))


def work(rank: int, world: int, folder: str) -> None:
    found = {}
    with in_group(rank, world, folder):
        for how, (_, parts) in ALONE.items():
            model = made(how)
            paused = model.no_sync if parts > 1 else contextlib.nullcontext
            with counting() as sent:
                state = state_of(model, trained(model, rank, parts=parts, paused=paused))
            found[how] = {"state": state, "rows": [row.fused for row in fusedres.report(model)], **sent}
        found["others"] = others(rank)
    leave(found, rank, folder)


def others_network() -> nn.Module:
    torch.manual_seed(0)
    return Others().double().train()


def others(rank: int) -> dict:
    """What is asked of a model that nobody wrapped."""
    found = {}
    model = fusedres.fuse(synchronised(network()))
    x, dz = batch(0, 4, torch.float64)
    with counting() as sent:
        found["evaluation"] = model.eval()(x).detach()
        found["sent in evaluation"] = sent["collectives"]
    own = torch.distributed.new_group([0]), torch.distributed.new_group([1])
    alone = fusedres.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(network(), own[rank]))
    with counting() as sent:
        found["a group of one"] = alone.train()(x[rank:]).detach()
        found["sent to nobody"] = sent["collectives"]
    both = torch.distributed.new_group([0, 1])
    paired = fusedres.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(network(), both)).train()
    share = slice(2 * rank, 2 * rank + 2)
    x = x[share].clone().requires_grad_()
    z = paired(x)
    (dx,) = torch.autograd.grad(z, x, dz[share, :3], create_graph=True)
    dx.square().sum().backward()
    second = paired.blocks[0].conv1.weight.grad
    found["a group of its own"] = z.detach()
    read = nn.SyncBatchNorm.convert_sync_batchnorm(others_network(), both)
    fusedres.fuse(read)
    found["found by structure"] = read(x).detach()
    found["norms that are fused"] = [norm.where is not None for norm in fusedres.report(read).norms]
    found["second derivative"] = second
    plainly = fusedres.unfuse(model).train()
    found["unfused"] = [type(module).__name__ for module in plainly.blocks]
    try:
        plainly(x)
    except ValueError as error:
        found["plain"] = str(error)
    return found


def die(rank: int, world: int, folder: str, how: str) -> None:
    found: dict = {}
    with in_group(rank, world, folder):
        torch.distributed.barrier()
        group = torch.distributed.new_group([0, 1], timeout=timedelta(seconds=4))
        model = fusedres.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(network(), group)).train()
        x, dz = (tensor[:, :3] for tensor in batch(rank, 3, torch.float64))
        model(x).backward(dz)
        gather, calls = collectives.all_gather, [0]

        def last(*args, **options):
            calls[0] += 1
            if rank == 1 and calls[0] == 6:  # of 4 forward and 4 backward
                leave({}, rank, folder)
                if how == "hangs":
                    time.sleep(9)
                os._exit(0)
            return gather(*args, **options)

        collectives.all_gather = last
        z = model(x)
        begin = time.monotonic()
        try:
            z.backward(dz)
        except RuntimeError as error:
            found = {"error": str(error), "seconds": time.monotonic() - begin}
        found["evaluation"] = model.eval()(x).detach()
        leave(found, rank, folder)
        os._exit(0)  # what gloo does with its threads when a group whose peer is gone is taken down is not of this test


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_processes(__name__, tmp_path_factory.mktemp("training"), len(SIZES))


def assert_equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-2)
    assert error <= 1e-10, f"{what}: {error:.1e}"


@pytest.mark.parametrize("how", ALONE)
def test_trains_as_one_process_with_the_joined_batch(how, results):
    settings, parts = ALONE[how]
    expected = trained(network(**settings), -1, parts=parts)
    outputs = [torch.split(each[how]["state"]["outputs"], size) for each, size in zip(results, SIZES, strict=True)]
    whole = torch.cat([torch.cat(step) for step in zip(*outputs, strict=True)])
    assert_equal(whole, expected.pop("outputs"), "outputs")
    for each in results:
        state = {name: value for name, value in each[how]["state"].items() if name != "outputs"}
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(state[name], value, name)
        assert each[how]["rows"] == [True, True]


@pytest.mark.parametrize("how", ALONE)
def test_one_collective_for_each_batch_norm_and_direction_or_two(how, results):
    # The projection's goes with another layer's of its block: the first's forward, the last's backward.
    norms, parts = norms_of(network()) - 1, ALONE[how][1]
    again = 3 if "checkpoints" in how else 2  # and the forward pass once more
    assert [each[how]["collectives"] for each in results] == [again * norms * STEPS * parts] * len(SIZES)


def test_evaluation_waits_for_nobody(results):
    for each in results:
        found = each["others"]
        assert found["sent in evaluation"] == 0
        assert_equal(found["evaluation"], network().eval()(batch(0, 4, torch.float64)[0]), "evaluation")


def test_the_group_is_that_of_the_batch_norm(results):
    x, _ = batch(0, 4, torch.float64)
    for rank, each in enumerate(results):
        assert each["others"]["sent to nobody"] == 0
        assert_equal(each["others"]["a group of one"], network().train()(x[rank:]), "a group of one")
    together = torch.cat([each["others"]["a group of its own"] for each in results])
    assert_equal(together, network().train()(x), "a group of its own")
    together = torch.cat([each["others"]["found by structure"] for each in results])
    assert_equal(together, others_network()(x), "found by structure")
    assert all(each["others"]["norms that are fused"] == [True] * 3 for each in results)


def test_a_gradient_that_is_differentiated(results):
    x, dz = batch(0, 4, torch.float64)
    model = network().train()
    (dx,) = torch.autograd.grad(model(x.requires_grad_()), x, dz[:, :3], create_graph=True)
    dx.square().sum().backward()
    found = sum(each["others"]["second derivative"] for each in results)
    assert_equal(found, model.blocks[0].conv1.weight.grad, "second derivative")


def test_unfuse_gives_back_what_pytorch_has(results):
    for each in results:
        assert each["others"]["unfused"] == ["BasicBlock", "BasicBlock"]
        assert "expected input tensor to be on" in each["others"]["plain"]


@pytest.mark.parametrize("how", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_who_waits_for_a_process_that_is_gone_is_told(how, tmp_path):
    found, _ = in_processes(__name__, tmp_path, 2, how, timeout=60)
    assert found["error"] and found["seconds"] < 8
    assert found["evaluation"].isfinite().all()


if __name__ == "__main__":
    rank, world, folder, *how = sys.argv[1:]
    die(int(rank), int(world), folder, *how) if how else work(int(rank), int(world), folder)
