"""Decisions. Pure: standard library only; no asyncio, no I/O, no clock, no randomness, no logging."""
