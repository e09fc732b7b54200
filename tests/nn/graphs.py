"""What compilers are given of a model: graphs, and how often each op is in them."""

from collections import Counter

import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd


class Graphs:
    """A compiler that keeps every graph that it is given, forward and backward, and runs it as it is.

    ``calls`` are those of fused passes with their operands, as they were made.
    """

    def __init__(self):
        self.modules, self.calls = [], []
        self.backend = aot_autograd(fw_compiler=self._taken, bw_compiler=self._taken)

    def _taken(self, module, _):
        self.modules.append(module)
        return make_boxed_func(lambda *operands: _Noted(module, self.calls).run(*operands))

    def passes(self, which):
        """Of one graph."""
        return passes_in(self.modules[which])


class _Noted(torch.fx.Interpreter):
    def __init__(self, module, calls):
        super().__init__(module)
        self.calls = calls

    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", "") == "fusedres":
            self.calls.append((target, args))
        return super().call_function(target, args, kwargs)


def passes_in(module):
    """How often each fused pass is in a graph, and each convolution and batch norm of PyTorch's own."""
    found = Counter()
    for node in module.graph.nodes:
        if node.op == "call_function":
            target = node.args[0] if "auto_functionalized" in str(node.target) else node.target
            name = str(target).removesuffix(".default")
            if name.startswith("fusedres.") or "conv" in name or "batch_norm" in name:
                found[name.removeprefix("fusedres.")] += 1
    return dict(found)


class OwnBlock(nn.Module):
    """A block of somebody who knows nothing of fusedres."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_of_first = nn.BatchNorm2d(channels)
        self.slopes = nn.PReLU(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_of_second = nn.BatchNorm2d(channels)

    def forward(self, x):
        u = self.slopes(self.norm_of_first(self.first(x)))
        return torch.relu(x + self.norm_of_second(self.second(u)))
