"""What is switched from outside, by environment variables read when fusedres is imported."""

import os


def _is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


DISABLED = _is_set("FUSEDRES_DISABLE")
"""Every fused module runs its plain forward, and ops their library calls."""

PARALLEL_COMPILE = os.environ.get("FUSEDRES_PARALLEL_COMPILE", "1") not in ("", "0")
"""What a network launches is compiled before its first step, in as many processes as there are cores."""

PROFILE = _is_set("FUSEDRES_PROFILE")
"""Passes are named in profilers' timelines."""

STRICT = _is_set("FUSEDRES_STRICT")
"""Nothing is forgiven: a kernel that can not be started is an error, and the first replay of every note is held against
the pass as it is written."""
