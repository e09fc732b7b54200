"""Device code: `@triton.jit` functions, one file per kernel family. Imports Triton alone."""
