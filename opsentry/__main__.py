"""The command `opsentry`."""

from opsentry.cli.main import cli


def main() -> None:
    """Run the command line."""
    cli(prog_name="opsentry")


if __name__ == "__main__":
    main()
