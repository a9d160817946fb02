"""llama.cpp: its own server, as a binary or embedded from the Python package xllamacpp."""

from pool_managerd.engines.llamacpp.adapter import LlamaCpp as ADAPTER

__all__ = ["ADAPTER"]
