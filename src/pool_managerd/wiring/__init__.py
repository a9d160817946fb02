"""Composition: the concrete adapters that make a node."""
