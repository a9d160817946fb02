"""The GPUs beside the pools: scans, health, reservations, what is seen free."""
