"""Scripted stand-ins for the real parts, shipped so that embedders can test against them too."""
