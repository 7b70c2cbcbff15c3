"""``python -m dpo_cli``: the command line without the console script."""

from dpo_cli.cli.app import main

if __name__ == "__main__":
    main()
