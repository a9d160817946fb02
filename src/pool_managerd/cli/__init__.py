"""The command line (DESIGN §7): each command is a thin call of the control API, or starts the daemon."""
