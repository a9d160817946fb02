"""``python -m pool_managerd.cli`` is ``pool-managerd``."""

from pool_managerd.cli.main import run

if __name__ == "__main__":
    run()
