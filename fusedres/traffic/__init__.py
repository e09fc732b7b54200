"""What a pass moves, computes and keeps, counted."""
