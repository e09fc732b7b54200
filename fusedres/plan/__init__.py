"""Which schedule a layer runs on."""

from .choose import AUTO, chain_schedule, check_schedule, use_moments
from .schedule import SCHEDULES, Schedule

__all__ = ["AUTO", "SCHEDULES", "Schedule", "chain_schedule", "check_schedule", "use_moments"]
