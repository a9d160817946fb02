"""Measures what the documentation promises, beside other programs where they are installed: ``python -m bench``."""
