"""One torch.autograd.Function per fused pattern: they call ops and keep tensors, and hold no arithmetic."""

from .add_act import AddAct
from .bn_add_act import BNAddAct
from .conv_chain import ConvChain
from .dense import Dense
from .global_pool import GlobalPool
from .preact import PreAct
from .stem_pool import StemPool

__all__ = ["AddAct", "BNAddAct", "ConvChain", "Dense", "GlobalPool", "PreAct", "StemPool"]
