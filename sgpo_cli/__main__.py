"""`python -m sgpo_cli` is `sgpo`."""

from sgpo_cli.cli import main

if __name__ == "__main__":
    main()
