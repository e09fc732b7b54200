"""Training: data that needs no download, and the demonstration that fused and plain training agree."""
