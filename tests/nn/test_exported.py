"""Exported models: `torch.export` keeps the fused passes, ONNX and what was unfused get PyTorch's own calls."""

import copy
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet

import fusedres
from fusedres.compiler.targets import TARGETS
from fusedres.models import preact_resnet
from fusedres.plan.gpus import target_gpu
from fusedres.runtime import call, launch
from tests.comparison import relative_error
from tests.gpu_support import needs_gpu
from tests.nn.graphs import OwnBlock, passes_in
from tests.nn.twins import randomised

BATCH = torch.export.Dim("batch", min=2, max=64)


def small_resnet():
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


MODELS = {
    "resnet": (small_resnet, (3, 32, 32), {"evaluated_stem": 1, "evaluated_chain": 4}),
    "own block": (lambda: nn.Sequential(OwnBlock()), (8, 9, 9), {"bn_prelu": 1, "evaluated_chain": 1}),
    "pre-activation": (lambda: preact_resnet(8, fused=False), (3, 8, 8),
                       {"evaluated_chain": 1, "evaluated_preact": 3, "bn_add_act": 1}),
    "dense": (lambda: torchvision.models.DenseNet(4, (2,), 8, num_classes=3), (3, 32, 32),
              {"evaluated_stem": 1, "evaluated_dense": 1, "bn_add_act": 1}),
}  # fmt: skip


def exported(model, *size, strict=False):
    return torch.export.export(model, (torch.randn(2, *size),), dynamic_shapes=({0: BATCH},), strict=strict)


def fused_passes(program):
    return {name: count for name, count in passes_in(program).items() if not name.startswith("aten.")}


@pytest.mark.parametrize("name", MODELS)
def test_an_evaluated_model_keeps_its_passes(name):
    make, size, passes = MODELS[name]
    fused = fusedres.fuse(randomised(make())).eval()
    program = exported(fused, *size)
    assert fused_passes(program) == passes
    assert not any("batch_norm" in one for one in passes_in(program))
    x = torch.randn(5, *size)
    with torch.no_grad():
        assert torch.equal(program.module()(x), fused(x))


def test_dynamo_exports_the_same():
    fused = fusedres.fuse(randomised(resnet.BasicBlock(8, 8))).eval()
    ours, theirs = (exported(fused, 8, 6, 6, strict=strict) for strict in (True, False))
    assert passes_in(ours) == passes_in(theirs) == {"evaluated_chain": 1}


def test_in_training_statistics_move():
    fused = fusedres.fuse(randomised(resnet.BasicBlock(8, 8)))
    twin = copy.deepcopy(fused)
    module = exported(fused, 8, 6, 6).module()
    x = torch.randn(3, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(module(x), twin(x))
    assert all(torch.equal(found, twin.get_buffer(name)) for name, found in module.named_buffers())
    assert int(twin.bn1.num_batches_tracked) == 1


@pytest.mark.slow
def test_another_process_loads_it_where_fusedres_is_installed(tmp_path):
    fused = fusedres.fuse(randomised(resnet.BasicBlock(8, 8))).eval()
    program, x = exported(fused, 8, 6, 6), torch.randn(3, 8, 6, 6)
    torch.export.save(program, tmp_path / "block.pt2")
    with torch.no_grad():
        torch.save((x, program.module()(x)), tmp_path / "numbers.pt")
    code = f"""
import torch, fusedres
program = torch.export.load(r"{tmp_path / "block.pt2"}")
x, z = torch.load(r"{tmp_path / "numbers.pt"}")
assert any("fusedres.evaluated_chain" in str(node.target) for node in program.graph.nodes)
with torch.no_grad():
    assert torch.equal(program.module()(x), z)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_was_unfused_is_exported_as_plain():
    plain = randomised(small_resnet()).eval()
    unfused = fusedres.unfuse(fusedres.fuse(copy.deepcopy(plain)))
    assert passes_in(exported(unfused, 3, 32, 32)) == passes_in(exported(plain, 3, 32, 32))


def test_onnx_is_given_the_plain_modules(monkeypatch):
    plain = randomised(resnet.BasicBlock(8, 8)).eval()
    fused = fusedres.fuse(copy.deepcopy(plain))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert passes_in(exported(fused, 8, 6, 6)) == passes_in(exported(plain, 8, 6, 6))


@pytest.mark.slow
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    import onnx

    fused = fusedres.fuse(randomised(small_resnet())).eval()
    torch.onnx.export(fused, (torch.randn(2, 3, 32, 32),), tmp_path / "model.onnx", dynamo=True)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert {node.domain for node in nodes} == {""} and sum(node.op_type == "Conv" for node in nodes) == 12


@pytest.mark.slow
def test_packaged_by_aotinductor(tmp_path):
    fused = fusedres.fuse(randomised(small_resnet())).eval()
    program = exported(fused, 3, 32, 32)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            assert relative_error(packaged(x), fused(x)) < 1e-5


# An H100, as Inductor asks for it.
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, warp_size=32, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20,
)  # fmt: skip


@pytest.mark.slow
def test_inductors_code_for_cuda_is_the_passes_and_nothing_between(monkeypatch):
    """On fake tensors of a GPU that is not there: no copies, no layouts changed between two blocks."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    monkeypatch.setattr(launch, "_device_target", lambda index: TARGETS["sm_90"])
    monkeypatch.setattr(call, "device_gpu", lambda index: target_gpu(TARGETS["sm_90"]))
    blocks = nn.Sequential(*(resnet.Bottleneck(64, 16) for _ in range(2)))
    fused = fusedres.fuse(blocks, schedule="prologue").eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in fused.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in list(table.items()):
                    if tensor is None:
                        continue
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    table[name] = nn.Parameter(fake, requires_grad=False) if table is module._parameters else fake
        x = torch.empty(4, 64, 8, 8, device="cuda").to(memory_format=torch.channels_last)
        module = torch.export.export(fused, (x,)).run_decompositions().graph_module
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    cuda = {
        "is_available": True, "current_device": 0, "device_count": 1, "get_device_properties": H100,
        "get_device_capability": (9, 0), "_lazy_init": None,
    }  # fmt: skip
    with mock.patch.multiple(torch.cuda, **{name: (lambda *_, of=of: of) for name, of in cuda.items()}), mode:
        lowering = GraphLowering(module, example_inputs=inputs)
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code, *_ = lowering.codegen()
    assert_passes_alone(getattr(code, "value", code), {"evaluated_chain": 2})


def assert_passes_alone(source, passes):
    """The code that Inductor wrote calls these ops, and no kernel of its own."""
    body = source[source.index("def call(") :]
    for name, count in passes.items():
        assert body.count(f"torch.ops.fusedres.{name}.default(") == count
    for other in (".run(", "extern_kernels", "torch.ops.aten", "empty_strided"):
        assert other not in body


@needs_gpu
@pytest.mark.slow
def test_compiled_by_inductor_on_a_gpu():
    from torch._inductor.utils import run_fw_bw_and_get_code

    torch._dynamo.reset()
    blocks = nn.Sequential(resnet.Bottleneck(64, 16), resnet.BasicBlock(64, 64))
    fused = fusedres.fuse(randomised(blocks).cuda().to(memory_format=torch.channels_last), schedule="prologue")
    twin = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True)
    codes = []
    for batch in (2, 3):
        x = torch.randn(batch, 64, 8, 8, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
        z, code = run_fw_bw_and_get_code(lambda x=x: compiled(x))
        codes += code
        w = twin(x)
        w.sum().backward()
        assert torch.equal(z, w)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(fused.parameters(), twin.parameters(), strict=True))
    forward, *_ = (code for code in codes if "conv_chain_backward.default(" not in code)
    assert_passes_alone(forward, {"conv_chain": 2, "move_statistics": 2})
