"""One torch.autograd.Function per fused pattern: they call ops and keep tensors, and hold no arithmetic."""

from fusedres.autograd.chain import ConvChain
from fusedres.autograd.dense import Dense
from fusedres.autograd.ends import AddAct, BNAddAct, BNPReLU
from fusedres.autograd.global_pool import GlobalPool
from fusedres.autograd.graph import defined
from fusedres.autograd.preact import PreAct
from fusedres.autograd.stem import StemPool

__all__ = ["AddAct", "BNAddAct", "BNPReLU", "ConvChain", "Dense", "GlobalPool", "PreAct", "StemPool"]

for _function in (ConvChain, StemPool, PreAct, Dense, AddAct, BNAddAct, BNPReLU):
    defined(_function)
