"""The server with a fake node and the way to call a command, for every test of the command line."""

from tests.cli.test_commands import invoke, server
from tests.cli.top_nodes import gateway, node

__all__ = ["gateway", "invoke", "node", "server"]
