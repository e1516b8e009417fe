"""`python -m dina_reward.cli` is `dina-reward`."""

from __future__ import annotations

import sys

from dina_reward.lazy import missing_extra


def main() -> None:
    """Entry point; says in one line which extra brings what is missing."""
    try:
        from dina_reward.cli.app import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"error: {missing_extra(error, 'the command line')}")
    run()


if __name__ == "__main__":
    main()
