import io
import socket
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from opsentry import __version__
from opsentry.cli.main import cli
from opsentry.cli.output import table
from opsentry.settings import Settings
from tests.system.processes import environment, free_port, opsentry


def commands(command=cli, path=()):
    """Yield the path of every command and group."""
    yield path
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))


def test_every_command_has_help():
    found = list(commands())
    assert len(found) > 12
    for path in found:
        for option in ("--help", "-h"):
            ran = CliRunner().invoke(cli, [*path, option], prog_name="opsentry")
            assert (ran.exit_code, ran.stderr) == (0, "")
            usage, _, text = ran.stdout.partition("\n\n")
            assert usage.startswith(" ".join(("Usage: opsentry", *path)))
            assert text.strip()


async def test_the_process_prints_help():
    ran = await opsentry(environment(), "--help")
    assert (ran.code, ran.err) == (0, "")
    assert "Exit codes: 0 done, 1 failed, 2 wrong use." in " ".join(ran.out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("tenant", "nonsense"), "No such command 'nonsense'"),
        (("tenant", "create"), "Missing argument 'SLUG'"),
        (("token", "create", "--tenant", "acme", "--name", "CI"), "Missing option '--scope'"),
        (("serve", "--port", "70000"), "Invalid value for '--port'"),
        (("serve", "--nonsense"), "No such option '--nonsense'"),
        (("token", "create", "--tenant", "a", "--name", "b", "--scope", "c", "--expires", "soon"), "Invalid value for"),
        (("operator", "token", "create"), "Missing argument 'NAME'"),
        (("import", "statuspage"), "Missing argument 'FILE'"),
    ],
)
def test_wrong_use_exits_with_2_and_names_the_mistake(arguments, says):
    ran = CliRunner().invoke(cli, list(arguments), prog_name="opsentry")
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert says in ran.stderr


async def test_wrong_use_of_the_process_exits_with_2():
    ran = await opsentry(environment(), "nonsense")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith("Error: No such command 'nonsense'.\n")


async def test_the_version_is_printed():
    assert await opsentry(environment(), "--version") == (0, f"opsentry, version {__version__}\n", "")


async def test_all_settings_are_listed():
    ran = await opsentry(environment(COLUMNS="200"), "config")
    assert ran.code == 0
    for variable, default, meaning in Settings.describe():
        (line,) = [line for line in ran.out.splitlines() if line.startswith(f"{variable} ")]
        assert default in line
        assert meaning in line


@pytest.mark.parametrize("arguments", [("serve",), ("migrate",), ("tenant", "list"), ("demo",)])
async def test_every_invalid_setting_is_named(arguments, tmp_path):
    env = environment(
        OPSENTRY_PORT="http",
        OPSENTRY_RATE_LIMIT="lots",
        OPSENTRY_DATABASE_URL="",
        OPSENTRY_TRUSTED_PROXIES="10.0.0.0/99",
        OPSENTRY_LOG_LEVEL="loud",
        OPSENTRY_HOST="127.0.0.1",
        OPSENTRY_DEMO_DIR=str(tmp_path),
    )
    ran = await opsentry(env, *arguments)
    assert (ran.code, ran.out) == (2, "")
    named = [line for line in ran.err.splitlines() if "OPSENTRY_" in line]
    assert [name in line for name, line in zip(INVALID, named, strict=True)] == [True] * len(INVALID)
    assert "Traceback" not in ran.err


INVALID = ("DATABASE_URL", "PORT", "TRUSTED_PROXIES", "RATE_LIMIT", "LOG_LEVEL")


@pytest.mark.parametrize(
    "arguments",
    [
        ("migrate",),
        ("tenant", "create", "acme"),
        ("tenant", "list"),
        ("token", "create", "--tenant", "acme", "--name", "CI", "--scope", "read:status"),
        ("token", "list", "--tenant", "acme"),
        ("token", "revoke", "--tenant", "acme", "00000000"),
        ("operator", "token", "create", "on call"),
        ("operator", "token", "list"),
        ("operator", "token", "revoke", "00000000"),
        ("service", "create", "--tenant", "acme", "main-api"),
        ("service", "list", "--tenant", "acme"),
    ],
)
async def test_an_unreachable_database_prints_one_line(arguments):
    env = environment(OPSENTRY_DATABASE_URL=f"postgresql://opsentry@127.0.0.1:{free_port()}/opsentry")
    ran = await opsentry(env, *arguments)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Error: database: ")
    assert "OPSENTRY_DATABASE_URL" in ran.err
    assert ran.err.count("\n") == 1


async def test_an_invalid_database_url_prints_one_line():
    ran = await opsentry(environment(OPSENTRY_DATABASE_URL="nonsense"), "tenant", "list")
    assert ran.code in {1, 2}
    assert ran.err.rstrip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in ran.err


async def test_a_port_in_use_prints_one_line(settings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = await opsentry(environment(settings), "serve", "--port", str(taken.getsockname()[1]))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Error: ")
    assert "address already in use" in ran.err
    assert ran.err.count("\n") == 1


def test_commands_raise_the_open_file_limit():
    code = (
        "import resource; from opsentry.cli.common import run\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE); resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "async def work(): return resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "soft, hard = run(work()); assert soft == hard > 64, (soft, hard)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_table_of_80_columns_keeps_names_whole():
    made = table("projection", "tenants", "up_to_date", "lagging", "halted", "paused", "lag_events", "to_rebuild")
    made.add_row("subscriptions", *("1000",) * 4, "False", "1000", "1000")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(made)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("subscriptions ") for line in lines)
