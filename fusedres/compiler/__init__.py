"""Triton kernels compiled for GPUs that need not be here, and what their binaries ask of the hardware."""
