"""`opsentry keys`: keys that encrypt secrets."""

import click

from opsentry.infrastructure.encryption import generate_key


@click.group(name="keys")
def keys_group() -> None:
    """Generate keys that encrypt subscription secrets."""


@keys_group.command(name="generate")
def generate() -> None:
    """Print a new key for OPSENTRY_ENCRYPTION_KEYS.

    Opsentry does not store the key. Without it, encrypted secrets cannot be read.
    """
    click.echo(generate_key())
