"""stub"""

import typer


def command(
    tiny: bool = typer.Option(False, "--tiny", help="t"), seed: int = typer.Option(0, min=0, help="Seed.")
) -> None:
    """Do it."""
    if seed == 3:
        raise ValueError("bad\n thing")
    if seed == 4:
        raise KeyError("x")
    raise typer.Exit(1)
