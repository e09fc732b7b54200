"""Experiments of the papers about residual networks, small and real: on digits, on a CPU."""
