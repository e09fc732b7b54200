"""cuDNN's fused graphs, reached through nvidia-cudnn-frontend: what PyTorch itself does not call.

Two of its patterns: convolution, scale, bias, addition and ReLU in one kernel (inference, with batch norm folded), and
scale, bias and ReLU on load, convolution, sums of the output (training, fp16). Which of them the installed cuDNN has an
engine for on the GPU at hand it says when the graph is built; a graph without one raises `NotSupported`.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fusedres.bench.setting import NotSupported
from fusedres.operands import Geometry

__all__ = ["conv_scale_add_relu", "infer_with_graphs", "prologue_conv_stats", "why_unavailable"]

SAME = Geometry(padding=(1, 1))


def why_unavailable(device: torch.device) -> str | None:
    """Why no graph can run on ``device``, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "cuDNN runs on NVIDIA's GPUs"
    if importlib.util.find_spec("cudnn") is None:
        return "not installed: pip install nvidia-cudnn-frontend"
    return None


class Graph(NamedTuple):
    """A built graph, its inputs and outputs in order, and the bytes that it needs beside them."""

    graph: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    workspace: int


class Layout(NamedTuple):
    """What a graph is built for: a tensor's sizes, strides and dtype."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Of a channels_last tensor; PyTorch's own strides of a dimension of size 1 can be anything."""
        _, c, h, w = tensor.shape
        return cls(tuple(tensor.shape), (h * w * c, 1, w * c, c), tensor.dtype)


def _data_type(dtype: torch.dtype) -> Any:
    import cudnn

    return {
        torch.float16: cudnn.data_type.HALF,
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float32: cudnn.data_type.FLOAT,
    }[dtype]


@functools.cache
def _handle(index: int) -> Any:
    import cudnn

    with torch.cuda.device(index):
        return cudnn.create_handle()


def _new_graph(dtype: torch.dtype, device: torch.device) -> Any:
    import cudnn

    index = device.index if device.index is not None else torch.cuda.current_device()
    return cudnn.pygraph(
        io_data_type=_data_type(dtype), intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT, handle=_handle(index),
    )  # fmt: skip


def _placed(graph: Any, layout: Layout, name: str) -> Any:
    return graph.tensor(
        dim=list(layout.size), stride=list(layout.stride), data_type=_data_type(layout.dtype), name=name
    )


def _built(graph: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> Graph:
    import cudnn

    try:
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    except cudnn.cudnnGraphNotSupportedError as error:
        raise NotSupported(f"cuDNN has no engine for this graph here: {error}") from error
    return Graph(graph, inputs, outputs, graph.get_workspace_size())


def _run(built: Graph, operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
    import cudnn

    device = operands[0].device
    workspace = torch.empty(max(1, built.workspace), dtype=torch.uint8, device=device)
    index = device.index if device.index is not None else torch.cuda.current_device()
    handle = _handle(index)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    pairs = zip((*built.inputs, *built.outputs), (*operands, *results), strict=True)
    built.graph.execute(dict(pairs), workspace, handle=handle)


def _convolved(graph: Any, x: Any, weight: Any, geometry: Geometry) -> Any:
    stride, padding, dilation, _ = geometry
    return graph.conv_fprop(image=x, weight=weight, padding=list(padding), stride=list(stride), dilation=list(dilation))


@functools.cache
def inference_graph(
    x: Layout, weight: Layout, numbers: Layout | None, residual: Layout | None, geometry: Geometry, relu: bool,
    device: torch.device,
) -> Graph:  # fmt: skip
    """act(conv(x) * scale + shift + residual); ``numbers`` is the layout of scale and shift, None without a scale."""
    graph = _new_graph(x.dtype, device)
    operands = [_placed(graph, x, "x"), _placed(graph, weight, "weight")]
    z = _convolved(graph, operands[0], operands[1], geometry)
    k = weight.size[0]
    vector = numbers or Layout((1, k, 1, 1), (k, 1, k, k), x.dtype)
    if numbers is not None:
        operands.append(_placed(graph, vector, "scale"))
        z = graph.mul(a=z, b=operands[-1])
    operands.append(_placed(graph, vector, "shift"))
    z = graph.add(a=z, b=operands[-1])
    if residual is not None:
        operands.append(_placed(graph, residual, "residual"))
        z = graph.add(a=z, b=operands[-1])
    if relu:
        z = graph.relu(z)
    z.set_output(True).set_data_type(_data_type(x.dtype))
    return _built(graph, tuple(operands), (z,))


def _output(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    p, q = geometry.output_size(x.shape[2], x.shape[3], (weight.shape[2], weight.shape[3]))
    size = (x.shape[0], weight.shape[0], p, q)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _vector(tensor: Tensor) -> Tensor:
    return tensor.view(1, -1, 1, 1)


def conv_scale_add_relu(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None = None,
    geometry: Geometry = SAME, relu: bool = True,
) -> Tensor:  # fmt: skip
    """act(conv(x, weight) * scale + shift + residual) in one graph.

    Args:
        x: (N, C, H, W) channels_last.
        weight: (K, C, R, S) channels_last.
        scale, shift: (K,); a scale of None is 1.
        residual: (N, K, P, Q) or None.
        geometry: of the convolution; one group.
        relu: whether to rectify.

    Raises:
        NotSupported: cuDNN has no engine for it.
    """
    vectors = [_vector(vector) for vector in (scale, shift) if vector is not None]
    layouts = (
        Layout.of(x), Layout.of(weight), None if scale is None else Layout.of(vectors[0]),
        None if residual is None else Layout.of(residual),
    )  # fmt: skip
    built = inference_graph(*layouts, geometry, relu, x.device)
    z = _output(x, weight, geometry)
    _run(built, (x, weight, *vectors, *(() if residual is None else (residual,))), (z,))
    return z


@functools.cache
def training_graph(x: Layout, numbers: Layout, weight: Layout, geometry: Geometry, device: torch.device) -> Graph:
    """y = conv(relu(x * scale + shift)), the sums of y and of its squares."""
    import cudnn

    graph = _new_graph(x.dtype, device)
    placed = [
        _placed(graph, layout, name)
        for layout, name in ((x, "x"), (numbers, "scale"), (numbers, "shift"), (weight, "weight"))
    ]
    u = graph.relu(graph.add(a=graph.mul(a=placed[0], b=placed[1]), b=placed[2]))
    y = _convolved(graph, u, placed[3], geometry)
    sums = graph.genstats(y)
    y.set_output(True).set_data_type(_data_type(x.dtype))
    for total in sums:
        total.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    return _built(graph, tuple(placed), (y, *sums))


def prologue_conv_stats(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, geometry: Geometry = SAME, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """y = conv(relu(x * scale + shift)) and batch norm's (mean, invstd) of it, from a graph and its two sums.

    Raises:
        NotSupported: cuDNN has no engine for it.
    """
    numbers = [_vector(vector.to(x.dtype)) for vector in (scale, shift)]
    built = training_graph(Layout.of(x), Layout.of(numbers[0]), Layout.of(weight), geometry, x.device)
    y = _output(x, weight, geometry)
    total, squares = torch.empty((2, 1, weight.shape[0], 1, 1), dtype=torch.float32, device=x.device)
    _run(built, (x, *numbers, weight), (y, total, squares))
    count = y.numel() // y.shape[1]
    mean = total.flatten() / count
    return y, mean, torch.rsqrt(squares.flatten() / count - mean.square() + eps)


class FoldedConv(nn.Module):
    """A convolution with the batch norm behind it in its weight, and what comes after: addition, ReLU."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        folded = nn.utils.fuse_conv_bn_eval(conv, bn)
        assert folded.bias is not None
        self.weight = folded.weight.detach().contiguous(memory_format=torch.channels_last)
        self.shift = folded.bias.detach()
        # Whose pairs the type stubs do not know for pairs.
        stride, padding, dilation = (cast(tuple[int, int], pair) for pair in (conv.stride, conv.padding, conv.dilation))
        self.geometry = Geometry(stride, padding, dilation, conv.groups)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        return conv_scale_add_relu(x, self.weight, None, self.shift, residual, self.geometry, relu)


class GraphBlock(nn.Module):
    """A BasicBlock or Bottleneck in evaluation: a graph for each convolution."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        numbers = (1, 2, 3) if hasattr(block, "conv3") else (1, 2)
        pairs = [FoldedConv(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in numbers]
        self.inner, self.end = nn.ModuleList(pairs[:-1]), pairs[-1]
        self.projection = None if block.downsample is None else FoldedConv(*block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.projection is None else self.projection(x, relu=False)
        for conv in self.inner:
            x = conv(x)
        return self.end(x, shortcut)


def infer_with_graphs(model: nn.Module) -> nn.Module:
    """Replace, in a copy's own place, torchvision's blocks (of one group) and its stem by graphs.

    Raises:
        NotSupported: the model holds no such block.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    if isinstance(model, (BasicBlock, Bottleneck)):
        return GraphBlock(model)
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (BasicBlock, Bottleneck)) and child.conv2.groups == 1:
                setattr(parent, name, GraphBlock(child))
                replaced += 1
    if not replaced:
        raise NotSupported("the model holds none of torchvision's residual blocks of one group")
    if isinstance(model, ResNet):
        stem: Any = model
        stem.conv1 = FoldedConv(model.conv1, model.bn1)
        stem.bn1, stem.relu = nn.Identity(), nn.Identity()
    return model
