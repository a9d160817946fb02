"""Running engine processes (DESIGN §4): fork server, shims, identity, the stop ladder, logs and files.

``wire``, ``procfs``, ``logfile``, ``confine``, ``reaper``, ``removal``, ``shim`` and ``forkserver`` also run in the fork
server and import the standard library and each other only; it loads them without running this file.
"""
