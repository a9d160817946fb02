"""Starts on demand: who waits for a slot, who is given one, and what must go so that another model fits."""
