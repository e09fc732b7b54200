"""Schedules: what a block writes to memory and what it forms again on load."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """One way to run a chain of convolution, batch norm and ReLU, each part a choice of its own.

    Attributes:
        name: how reports call it.
        statistics: batch norm's sums are made in the epilogues of the convolutions (forward: of y and y^2; backward:
            the producer's ReLU mask, sum(g) and sum(g * y_hat)), not in passes of their own.
        prologue: relu(bn(y)) is formed on load by whoever consumes it and never written.
        moments: batch norm of 1x1 convolutions comes from the moments of their input; their output is never written.
        bit_masks: the last ReLU's mask is kept as bits; otherwise the block's output itself serves as the mask.
    """

    name: str
    statistics: bool = False
    prologue: bool = False
    moments: bool = False
    bit_masks: bool = True

    def __post_init__(self) -> None:
        if self.prologue and not self.statistics:
            raise ValueError(f"schedule {self.name}: a prologue needs statistics from the epilogue before it")


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("block_end"),
        Schedule("stats", statistics=True),
        Schedule("prologue", statistics=True, prologue=True),
        Schedule("moments", statistics=True, prologue=True, moments=True),
    )
}
"""The ladder: each rung writes and reads less than the one before."""
