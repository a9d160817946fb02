"""The server with a fake node and the way to call a command, for every test of the command line."""

from tests.cli.test_commands import invoke, server

__all__ = ["invoke", "server"]
