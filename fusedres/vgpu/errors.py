"""What can go wrong when a kernel is executed on the CPU."""

from fusedres.compiler import targets


class VgpuError(RuntimeError):
    """A kernel did what a GPU would not forgive, or what this machine can not execute."""


class Unavailable(VgpuError, targets.Unavailable):
    """This machine lacks something that executing kernels needs; the message says what to install."""


class NotExecutable(VgpuError):
    """The kernel uses an operation of its target that has no counterpart here; the message names it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"not executable on the CPU: {what}")


class OutOfResources(VgpuError):
    """A block that the target can not hold."""


class OutOfBounds(VgpuError):
    """An access outside every argument, or outside the block's shared memory."""


class Misaligned(VgpuError):
    """An access whose address is not a multiple of its size."""


class NeverWritten(VgpuError):
    """A read of memory that nothing had been written to."""


class Race(VgpuError):
    """Two warps or two blocks touched the same bytes with nothing between them that orders the two."""


class Divergence(VgpuError):
    """Threads that must wait for each other took different ways."""


class Deadlock(VgpuError):
    """A warp that waits for what no other warp will do."""


class Refused(VgpuError):
    """An mbarrier or a tensor map, or a use of one, that the hardware does not take."""
