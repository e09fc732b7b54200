"""Blocks that the papers compare with the residual block: other shortcuts, other orders, gates, random depth.

Figures are those of He et al. 2016 (arXiv:1603.05027).
"""

import torch
from torch import Tensor, nn

from fusedres.nn.plain.residual import BasicBlock, Bottleneck, ResidualBlock, conv3x3


class ScaledBlock(BasicBlock):
    """Constant scaling (figure 2b): z = relu(shortcut_scale * shortcut + residual_scale * F(x)).

    Args:
        in_channels, channels, stride, shortcut: as in `BasicBlock`.
        shortcut_scale, residual_scale: of the two paths.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        shortcut: str = "projection",
        shortcut_scale: float = 0.5,
        residual_scale: float = 0.5,
    ) -> None:
        super().__init__(in_channels, channels, stride, shortcut=shortcut)
        self.shortcut_scale, self.residual_scale = shortcut_scale, residual_scale

    def shortcut(self, x: Tensor) -> Tensor:
        return super().shortcut(x) * self.shortcut_scale

    def residual(self, x: Tensor) -> Tensor:
        return super().residual(x) * self.residual_scale


class DropoutShortcutBlock(BasicBlock):
    """Dropout on the shortcut (figure 2f): z = relu(dropout(shortcut) + F(x)).

    Args:
        in_channels, channels, stride, shortcut: as in `BasicBlock`.
        dropout: probability of a value being dropped.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, shortcut: str = "projection", dropout: float = 0.5
    ) -> None:
        super().__init__(in_channels, channels, stride, shortcut=shortcut)
        self.dropout = nn.Dropout(dropout)

    def shortcut(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(super().shortcut(x))
        return out


class GatedBlock(BasicBlock):
    """Gated shortcuts: with g = sigmoid(1x1 convolution of x + bias), z = relu((1 - g) * shortcut + g * F(x)).

    Exclusive gating (figure 2c) is this; shortcut-only gating (figure 2d) leaves F(x) as it is.

    Args:
        in_channels, channels, stride, shortcut: as in `BasicBlock`.
        exclusive: whether g scales F(x) too.
        gate_bias: the initial bias, 0 to -10 in the paper; a negative one lets the shortcut through.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        shortcut: str = "projection",
        exclusive: bool = True,
        gate_bias: float = -6.0,
    ) -> None:
        super().__init__(in_channels, channels, stride, shortcut=shortcut)
        self.exclusive, self.gate_bias = exclusive, gate_bias
        self.gate = nn.Conv2d(in_channels, channels, 1, stride)
        self.reset_gate()

    def reset_gate(self) -> None:
        """The gate's bias as at the start."""
        assert self.gate.bias is not None
        nn.init.constant_(self.gate.bias, self.gate_bias)

    def gate_and_shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g, and the shortcut behind its gate."""
        g = torch.sigmoid(self.gate(x))
        return g, (1 - g) * self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        g, shortcut = self.gate_and_shortcut(x)
        out = self.residual(x)
        z: Tensor = self.relu(shortcut + (g * out if self.exclusive else out))
        return z


class StochasticBlock(BasicBlock):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training a block's residual is left out at random.

    In training z = relu(shortcut + F(x)) with the probability ``survival``, else relu(shortcut); the draw is one per
    batch, from torch's CPU generator. In evaluation z = relu(shortcut + survival * F(x)). A block that is left out has
    no gradients: DistributedDataParallel needs ``find_unused_parameters=True``.

    Args:
        in_channels, channels, stride, shortcut: as in `BasicBlock`.
        survival: the probability of the residual's being there, above 0.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, shortcut: str = "projection", survival: float = 1.0
    ) -> None:
        super().__init__(in_channels, channels, stride, shortcut=shortcut)
        if not 0 < survival <= 1:
            raise ValueError(f"survival: expected a probability above 0, got {survival}")
        self.survival = survival

    def residual(self, x: Tensor) -> Tensor:
        out = super().residual(x)
        return out if self.training else out * self.survival

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() >= self.survival:
            return torch.relu(self.shortcut(x))
        return super().forward(x)


ORDERS = ("bn_after_add", "relu_before_add", "relu_only")


class _OrderedBlock(ResidualBlock):
    """The orders of figure 4 between the original (a: `BasicBlock`) and full pre-activation (e: `PreActBasicBlock`).

    ``"bn_after_add"`` (b): z = relu(bn(conv(...) + shortcut)). ``"relu_before_add"`` (c): z = relu(F(x)) + shortcut.
    ``"relu_only"`` (d): z = F(relu(x)) + shortcut.
    """

    order: str

    def _set_order(self, order: str) -> None:
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(map(repr, ORDERS))}, got {order!r}")
        self.order = order

    def before_last_norm(self, x: Tensor) -> Tensor:
        """conv(... relu(bn1(conv1(x))) ...)."""
        for i in range(1, self.depth):
            x = self.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        out: Tensor = getattr(self, f"conv{self.depth}")(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "relu_only":
            return self.residual(torch.relu(x)) + self.shortcut(x)
        if self.order == "relu_before_add":
            return torch.relu(self.residual(x)) + self.shortcut(x)
        z: Tensor = self.relu(self.last_norm(self.before_last_norm(x) + self.shortcut(x)))
        return z


class ActivationBasicBlock(_OrderedBlock, BasicBlock):
    """A basic block in one of the orders of figure 4.

    Args:
        in_channels, channels, stride, shortcut: as in `BasicBlock`.
        order: ``"bn_after_add"``, ``"relu_before_add"`` or ``"relu_only"``.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, shortcut: str = "projection", order: str
    ) -> None:
        super().__init__(in_channels, channels, stride, shortcut=shortcut)
        self._set_order(order)


class ActivationBottleneck(_OrderedBlock, Bottleneck):
    """A bottleneck in one of the orders of figure 4.

    Args:
        in_channels, channels, stride, shortcut: as in `Bottleneck`.
        order: ``"bn_after_add"``, ``"relu_before_add"`` or ``"relu_only"``.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, shortcut: str = "projection", order: str
    ) -> None:
        super().__init__(in_channels, channels, stride, shortcut=shortcut)
        self._set_order(order)


class HighwayBlock(nn.Module):
    """One convolutional layer of a highway network (Srivastava et al. 2015, arXiv:1505.00387).

    z = t * relu(h(x)) + (1 - t) * x with t = sigmoid(gate(x)); h and gate are 3x3 convolutions with biases.

    Args:
        channels: of input and output.
        gate_bias: the initial bias of the gate, negative to begin with the identity.
    """

    def __init__(self, channels: int, *, gate_bias: float = -2.0) -> None:
        super().__init__()
        self.gate_bias = gate_bias
        self.conv = conv3x3(channels, channels)
        self.gate = conv3x3(channels, channels)
        for convolution in (self.conv, self.gate):
            convolution.bias = nn.Parameter(torch.zeros(channels))
        self.reset_gate()

    def reset_gate(self) -> None:
        """The gate's bias as at the start."""
        assert self.gate.bias is not None
        nn.init.constant_(self.gate.bias, self.gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return t * torch.relu(self.conv(x)) + (1 - t) * x


def gated_modules(model: nn.Module) -> list[GatedBlock | HighwayBlock]:
    """Every block whose gate has an initial bias of its own."""
    return [module for module in model.modules() if isinstance(module, GatedBlock | HighwayBlock)]
