"""The version: of the package, of ``/health`` and of ``pool-managerd version``."""

__version__ = "0.1.0"
