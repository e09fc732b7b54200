"""Which schedule a layer runs on."""

from .choose import AUTO, Choice, announce, chain_schedule, check_schedule, choose, use_moments
from .schedule import SCHEDULES, Schedule

__all__ = [
    "AUTO", "SCHEDULES", "Choice", "Schedule", "announce", "chain_schedule", "check_schedule", "choose", "use_moments",
]  # fmt: skip
