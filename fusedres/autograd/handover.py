"""What one fused pass leaves for the next, whatever lies between them.

Three things: the statistics of a sum, for the batch norm that follows; the end of a block, for the block behind it;
and, on the way back, the sums of a gradient that its batch norm needs.
"""

from fusedres.operands import Partials, Producer
from fusedres.ops.bn_backward import NormSums
from fusedres.runtime.handover import Carried

statistics: Carried[Partials] = Carried()
"""Of a block's output: what a block that ends without a batch norm measured as it wrote it."""

ends: Carried[Producer] = Carried()
"""Of a block's output: the batch norm before its sum and its ReLU, in a network that hands it over."""

reduced: Carried[NormSums] = Carried()
"""Of a gradient at a block's output, already behind its ReLU: the sums that the batch norm there needs."""
