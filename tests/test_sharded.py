"""Fused blocks inside of PyTorch's sharding wrappers, two processes of gloo on the CPU."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres

WRAPPERS = ("fully_shard", "fully_shard before fuse", "FSDP", "FSDP, original parameters", "DDP")
STEPS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    widths = ((8, 8, 1), (8, 16, 2), (16, 16, 1))
    return nn.Sequential(*(fusedres.nn.plain.BasicBlock(*width) for width in widths), nn.Flatten(), nn.Linear(144, 3))


def wrapped(model: nn.Module, how: str) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    if how.startswith("fully_shard"):
        for block in list(model)[:3]:
            fully_shard(block)
        return fully_shard(model)
    if how == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({fusedres.nn.plain.BasicBlock}),
        use_orig_params="original" in how,
        device_id=torch.device("cpu"),
    )


def trained(model: nn.Module, rank: int) -> list[list[float]]:
    """Outputs of some steps, and of the evaluation after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs = []
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(4, 8, 5, 5)
        optimizer.zero_grad()
        z = model.train()(x)
        z.square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            outputs += [z.detach().flatten().tolist(), model.eval()(x).flatten().tolist()]
    return outputs


def work(rank: int, folder: str) -> None:
    from fusedres.nn import fused as module
    from fusedres.nn import size_rule

    size_rule.LEAST_WORK_PER_THREAD = 0
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    passes = [0]
    attempt = module.Fused.attempt

    def counting(self, *args):
        z = attempt(self, *args)
        passes[0] += z is not None
        return z

    module.Fused.attempt = counting  # type: ignore[method-assign]
    found = {}
    for how in WRAPPERS:
        plain, model = network(), network()
        late = how.endswith("before fuse")
        if not late:
            fusedres.fuse(model)
        model = wrapped(model, how)
        if late:
            fusedres.fuse(model)
        passes[0] = 0
        ours = trained(model, rank)
        fused = passes[0]
        rows = [row.fused for row in fusedres.report(model)]
        fusedres.unfuse(model)
        left = [type(m).__name__ for m in model.modules() if isinstance(m, module.Fused)]
        passes[0] = 0
        trained(model, rank)
        found[how] = {
            "ours": ours, "theirs": trained(wrapped(plain, how), rank), "passes": fused, "rows": rows, "left": left,
            "passes after unfuse": passes[0],
        }  # fmt: skip
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    if sys.platform != "linux" or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    folder = str(tmp_path_factory.mktemp("sharded"))
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), folder]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("how", WRAPPERS)
def test_trains_and_evaluates_as_plain_blocks_do(how, results):
    for result in results:
        found = result[how]
        torch.testing.assert_close(torch.tensor(found["ours"]), torch.tensor(found["theirs"]), rtol=1e-3, atol=1e-4)
        assert found["passes"] == 3 * 2 * STEPS, "not every call of a block was fused"
        assert found["rows"] == [True] * 3


@pytest.mark.parametrize("how", WRAPPERS)
def test_unfuse_leaves_no_fused_class(how, results):
    for result in results:
        assert result[how]["left"] == [] and result[how]["passes after unfuse"] == 0


def test_the_network_is_one_that_can_be_copied():
    assert type(copy.deepcopy(network())) is nn.Sequential


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
