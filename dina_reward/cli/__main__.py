"""`python -m dina_reward.cli` is `dina-reward`."""

from dina_reward.cli.app import main


if __name__ == "__main__":
    main()
