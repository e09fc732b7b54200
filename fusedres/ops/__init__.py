"""The primitives: per file one contract, its formula in plain PyTorch, and the other ways to compute it."""
