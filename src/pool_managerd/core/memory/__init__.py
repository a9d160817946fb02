"""What one launch will need of GPU memory and RAM."""
