"""Tiles, schedules and GPUs: pure functions of shape, dtype and target."""
