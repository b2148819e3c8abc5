import pytest

from tests.system.processes import environment, opsentry


@pytest.fixture
def run(settings):
    """Run a command that must succeed, and return its output."""

    async def succeed(*arguments):
        ran = await opsentry(environment(settings), *arguments)
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    return succeed


@pytest.fixture
def fail(settings):
    """Run a command that must fail with this exit code, and return the last line of its error."""

    async def refused(code, *arguments):
        ran = await opsentry(environment(settings), *arguments)
        assert (ran.code, ran.out) == (code, "")
        assert "Traceback" not in ran.err
        return ran.err.splitlines()[-1]

    return refused
