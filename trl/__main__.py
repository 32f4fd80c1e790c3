"""`python -m trl`: the `trl` command."""

from trl.cli.main import main

if __name__ == "__main__":
    main()
