"""How an op comes to run: backends, devices, launches, replayed passes, and what falls back to plain PyTorch."""
