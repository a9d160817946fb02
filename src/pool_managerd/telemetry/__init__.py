"""How the daemon tells what happened: metric series and log lines. Only the daemon and the CLI configure these."""
