"""Blocks that can not be read, or only in part, and some that look as if they could not. All take (N, 8, H, W)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class DecidesByValues(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if out.mean() > 0:
            out = out + x
        return F.relu(out)


class DecidesByShape(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        if x.shape[2] > 4:
            out = self.bn2(self.conv2(out))
        return F.relu(out + x)


class DecidesByChance(Block):
    """Stochastic depth for a whole batch."""

    def forward(self, x):
        if self.training and torch.rand(1).item() < 0.5:
            return F.relu(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class TakesAnything(Block):
    def forward(self, *xs):
        return super().forward(sum(xs))


class CallsTwice(Block):
    """One convolution and its batch norm, applied twice: the running statistics move twice."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn1(self.conv1(out)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class SharesConvolution(Block):
    """One convolution with a batch norm per scale."""

    def forward(self, x):
        fine = F.relu(self.bn1(self.conv1(x)))
        coarse = F.relu(self.bn2(self.conv1(F.avg_pool2d(x, 2))))
        return fine + F.interpolate(coarse, scale_factor=2) + self.conv2(x)


class TwoConsumers(Block):
    """The output of a batch norm is rectified, and added as it is."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return F.relu(self.bn2(self.conv2(F.relu(out))) + out)


class ConvolutionShown(Block):
    """What a convolution gives is used besides its batch norm."""

    def forward(self, x):
        raw = self.conv1(x)
        out = F.relu(self.bn1(raw))
        return F.relu(self.bn2(self.conv2(out)) + raw)


class CalledFromOutside(nn.Module):
    """A layer of the block is called by its parent, too."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(F.relu(self.block.bn1(self.block.conv1(x))))


class WithOwnGetattr(Block):
    def __getattr__(self, name):
        return super().__getattr__(name.replace("batchnorm", "bn"))

    def forward(self, x):
        out = F.relu(self.batchnorm1(self.conv1(x)))
        return F.relu(self.batchnorm2(self.conv2(out)) + x)


class Remembers(Block):
    """Keeps what it computed for who looks later."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        self.last = self.bn2(self.conv2(out))
        return F.relu(self.last + x)


class Collects(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        self.seen.append(out.detach())
        return F.relu(self.bn2(self.conv2(out)) + x)


class Counts(Block):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class WithoutGradients(Block):
    """The first half is frozen by its forward."""

    def forward(self, x):
        with torch.no_grad():
            out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Detaches(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x))).detach()
        return F.relu(self.bn2(self.conv2(out)) + x)


class WithoutAutocast(Block):
    """The second half insists on its input's precision."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        with torch.autocast(x.device.type, enabled=False):
            return F.relu(self.bn2(self.conv2(out.to(x.dtype))) + x)


class Checkpoints(Block):
    """Its first half is computed anew in the backward pass."""

    def _first(self, x):
        return F.relu(self.bn1(self.conv1(x)))

    def forward(self, x):
        out = checkpoint(self._first, x, use_reentrant=False) if x.requires_grad else self._first(x)
        return F.relu(self.bn2(self.conv2(out)) + x)


class ReadsWeights(Block):
    """Its loss term needs a weight, as in weight decay by hand."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x) + 1e-3 * self.conv1.weight.square().sum()


class FunctionalNorm(Block):
    """Calls the functions behind the modules."""

    def forward(self, x):
        out = F.conv2d(x, self.conv1.weight, None, 1, 1)
        norm = self.bn1
        out = F.batch_norm(
            out, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
        )
        return F.relu(self.bn2(self.conv2(F.relu(out))) + x)


class OverwritesInput(Block):
    """The ReLU before the first convolution writes over what the shortcut then adds."""

    def forward(self, x):
        x = x * 1
        out = self.bn1(self.conv1(F.relu(x, inplace=True)))
        return F.relu(self.bn2(self.conv2(F.relu(out))) + x)


class OverwritesShown(Block):
    """The output of a batch norm is rectified in place after somebody else has taken it."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        kept = out
        out = F.relu_(out)
        return self.bn2(self.conv2(out)) + kept


class OnlyInTraining(Block):
    """An auxiliary output that evaluation has not."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        z = F.relu(self.bn2(self.conv2(out)) + x)
        return (z, out) if self.training else z


def hook(part: nn.Module, kind: str) -> None:
    """A hook that doubles what it is given."""
    if kind == "forward":
        part.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif kind == "before":
        part.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    else:
        part.register_full_backward_hook(lambda module, dx, dz: (2 * dx[0],))


def hooked(layer: str, kind: str) -> Block:
    block = Block()
    hook(block.get_submodule(layer), kind)
    return block


def parametrized(how: Callable[[nn.Module], nn.Module], layer: str = "conv2") -> Block:
    block = Block()
    how(block.get_submodule(layer))
    return block


def tied() -> Block:
    block = Block()
    block.conv2.weight = block.conv1.weight
    return block


def same_layer() -> Block:
    """One batch norm under two names."""
    block = Block()
    block.bn2 = block.bn1
    return block


def forward_replaced() -> Block:
    block = Block()
    block.forward = lambda x: F.relu(block.bn2(block.conv2(block.bn1(block.conv1(x)))) - x)
    return block


def norm_in_evaluation() -> Block:
    """Its first batch norm is to keep its statistics: the parent's `train` is not asked again."""
    block = Block()
    block.bn1.train = lambda mode=True: block.bn1
    block.bn1.training = False
    return block


class Case(NamedTuple):
    """A block, and what is to be said of it.

    Attributes:
        make: without arguments.
        left: its batch norms that are in no fused pass.
        words: what the reason of each of these has in it; empty if the module that holds it is read and fused in part.
    """

    make: Callable[[], nn.Module]
    left: tuple[str, ...] = ()
    words: str = ""


BOTH = ("bn1", "bn2")

CASES = {
    "decides by values": Case(DecidesByValues, BOTH, "values"),
    "decides by shape": Case(DecidesByShape, BOTH, "shapes"),
    "decides by chance": Case(DecidesByChance, BOTH, "random|values"),
    "takes anything": Case(TakesAnything, BOTH, r"\*xs"),
    "calls twice": Case(CallsTwice, ("bn1",)),
    "shares a convolution": Case(SharesConvolution),
    "two consumers": Case(TwoConsumers),
    "convolution shown": Case(ConvolutionShown),
    "called from outside": Case(CalledFromOutside),
    "own getattr": Case(WithOwnGetattr, BOTH, "__getattr__"),
    "remembers": Case(Remembers, BOTH, "self.last"),
    "collects": Case(Collects, BOTH, "self.seen"),
    "counts": Case(Counts, BOTH, "calls"),
    "without gradients": Case(WithoutGradients, BOTH, "autograd"),
    "detaches": Case(Detaches),
    "without autocast": Case(WithoutAutocast, BOTH, "autocast|device_type"),
    "checkpoints": Case(Checkpoints, BOTH, ""),
    "reads weights": Case(ReadsWeights),
    "functional norm": Case(FunctionalNorm, ("bn1",), ""),
    "overwrites its input": Case(OverwritesInput),
    "overwrites what is shown": Case(OverwritesShown),
    "only in training": Case(OnlyInTraining),
    "hook on a convolution": Case(lambda: hooked("conv1", "forward"), BOTH, "conv1.*hook"),
    "hook on a batch norm": Case(lambda: hooked("bn2", "forward"), BOTH, "bn2.*hook"),
    "hook before a batch norm": Case(lambda: hooked("bn1", "before"), BOTH, "bn1.*hook"),
    "backward hook": Case(lambda: hooked("conv2", "backward"), BOTH, "conv2.*hook"),
    "hook on the block": Case(lambda: hooked("", "forward")),
    "weight norm": Case(lambda: parametrized(parametrizations.weight_norm)),
    "spectral norm": Case(lambda: parametrized(parametrizations.spectral_norm)),
    "old weight norm": Case(lambda: parametrized(nn.utils.weight_norm), BOTH, "conv2.*hook"),
    "tied weights": Case(tied),
    "one layer of two names": Case(same_layer, ("bn1",)),
    "forward replaced": Case(forward_replaced, BOTH, "forward was replaced"),
    "norm in evaluation": Case(norm_in_evaluation),
}
