"""The doors of the fused patterns: tensors are checked, a schedule is chosen, and training or inference runs."""
