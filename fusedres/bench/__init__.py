"""Benchmarks: each checks that the numbers agree before it reports a time or a size."""
