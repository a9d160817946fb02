"""GPUs, decided about: what is there, how healthy, who holds what, where a start goes."""
