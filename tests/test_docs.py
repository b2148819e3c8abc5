"""The docs lead somewhere: links, paths, commands, settings and endpoints exist, and code blocks are well-formed."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import msgspec
import pytest
from openapi_spec_validator import validate

from opsentry.api.v1 import schemas
from opsentry.application.uptime import ExplainedPeriod
from opsentry.cli.main import cli
from opsentry.notifications.delivery.history import Attempt, Delivery
from opsentry.settings import Settings
from tools import reference

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
# zsh is not installed everywhere.
SHELLS = [shell for shell in ("bash", "dash", "zsh") if shutil.which(shell)]
TOURS = [ROOT / "README.md", DOCS / "tutorial" / "first-ten-minutes.md"]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def blocks(page, language):
    return [
        block.replace("\n   ", "\n") for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def generated(page, name):
    (table,) = re.findall(rf"<!-- {name}:begin -->(.*)<!-- {name}:end -->", page.read_text(), re.DOTALL)
    return table


def links(page):
    return [link for link in re.findall(r"\]\(([^)]+)\)", prose(page)) if not link.startswith("https://")]


@every_page
def test_links_lead_to_pages_and_headings(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_named_paths_exist(page):
    for path in re.findall(r"`((?:docs|opsentry|migrations|tests|bench|tools)/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), path


def test_every_page_is_reachable_from_the_readme():
    reached, to_visit = set(), [ROOT / "README.md"]
    while to_visit:
        page = to_visit.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            to_visit += [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


@every_page
def test_python_blocks_compile(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@every_page
@pytest.mark.parametrize("shell", SHELLS)
def test_shell_blocks_parse(page, shell):
    for block in blocks(page, "sh"):
        parsed = subprocess.run([shell, "-n"], input=block, capture_output=True, text=True, check=False)
        assert parsed.stderr == "", block


@pytest.mark.parametrize("page", TOURS, ids=lambda page: page.name)
def test_tour_blocks_can_be_pasted(page):
    # An interactive zsh knows no comments, and a backtick starts a command.
    for block in blocks(page, "sh"):
        assert not re.search(r"(^|\s)#|`", block), block


def commands_in(page):
    """Yield the command lines of `opsentry` on a page, without the word `opsentry`."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").split("\n")]
    lines += re.findall(r"`(opsentry [^`]*)`", prose(page))
    for line in lines:
        yield from re.findall(r"(?<![\w./-])opsentry ([a-z][^|;)]*)", line)


@every_page
def test_documented_commands_exist(page):
    for line in commands_in(page):
        command: click.Command = cli
        words = shlex.split(line)
        while isinstance(command, click.Group) and words:
            name = words.pop(0)
            for alternative in name.split("|"):
                assert alternative in command.commands, line
            command = command.commands[name.split("|")[0]]
        options = {option for parameter in command.params for option in parameter.opts}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= options | {"--help"}, line


def leaves(group, name=""):
    for child in group.commands.values():
        path = f"{name} {child.name}".strip()
        yield from leaves(child, path) if isinstance(child, click.Group) else [(path, child)]


def test_the_command_line_page_lists_every_command_and_option():
    page = prose(DOCS / "reference" / "cli.md")
    for path, command in leaves(cli):
        row = re.search(rf"^\| `opsentry {path}[ `].*$", page, re.MULTILINE)
        assert row is not None, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name not in {"json_output", "everything"}:
                assert any(f"{option}" in row.group() for option in parameter.opts), f"{path} {parameter.opts}"


def test_the_settings_page_lists_every_setting():
    table = generated(DOCS / "reference" / "settings.md", "settings")
    rows = re.findall(r"^\| `(OPSENTRY_\w+)` \| (.*) \| (.*) \|$", table, re.MULTILINE)
    shown = [(each.variable, f"`{each.default}`" if each.default else "\N{EN DASH}") for each in Settings.describe()]
    assert rows == [(*row, each.meaning) for row, each in zip(shown, Settings.describe(), strict=True)]


def test_the_api_reference_lists_the_operations_that_are_served():
    assert {path.name: path.read_text() == text for path, text in reference.files().items()} == {
        "api.md": True,
        "openapi.json": True,
    }


def test_the_openapi_document_is_valid():
    validate(json.loads((DOCS / "reference" / "openapi.json").read_text()))


def test_the_glossary_defines_each_term_once_in_one_sentence():
    sections = prose(DOCS / "glossary.md").split("\n## ")[1:]
    rows = [re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)[1:] for section in sections]
    for terms in rows:
        names = [term for term, _ in terms]
        assert names == sorted(names, key=str.lower)
    meanings = [meaning for terms in rows for _, meaning in terms]
    assert [meaning for meaning in meanings if not re.fullmatch(r"[A-Z`][^.]*(?:\.\w[^.]*)*\.", meaning)] == []
    names = [term for terms in rows for term, _ in terms]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("page", sorted((DOCS / "decisions").glob("*.md")), ids=lambda page: page.stem)
def test_a_decision_has_context_decision_and_cost(page):
    headings = re.findall(r"^## (.*)$", prose(page), re.MULTILINE)
    if page.stem != "index":
        assert headings[:3] == ["Context", "Decision", "Cost"]
        assert headings[3:] in ([], ["Figures"])


@pytest.mark.parametrize("page", sorted((DOCS / "explanation").glob("*.md")), ids=lambda page: page.stem)
def test_the_functions_of_a_walk_through_exist(page):
    steps = re.findall(r"^\| \d+ \| `([\w/.]+)` \| `([\w.]+)` \|", prose(page), re.MULTILINE)
    assert len(steps) > 5
    for path, function in steps:
        source = (ROOT / path).read_text()
        for name in function.split("."):
            assert re.search(rf"^\s*(?:async def|def|class) {name}\b", source, re.MULTILINE), f"{path}: {function}"


def encoded_names(struct):
    return [field.encode_name for field in msgspec.structs.fields(struct)]


@pytest.mark.parametrize(
    ("beginning", "struct"),
    [
        ("An incident has these fields:", schemas.Incident),
        ("A maintenance window has these fields:", schemas.MaintenanceWindow),
        ("A service has these fields:", schemas.Service),
        ("A subscription has these fields:", schemas.Subscription),
    ],
)
def test_the_api_page_lists_the_fields_of_a_resource(beginning, struct):
    sentence = prose(DOCS / "reference" / "api.md").partition(beginning)[2].partition(".")[0]
    assert re.findall(r"`(\w+)", sentence) == encoded_names(struct)


@pytest.mark.parametrize(
    ("beginning", "struct"),
    [("Each entry of `periods` has:", ExplainedPeriod), ("A delivery is one message to one subscription.", Delivery)],
)
def test_the_api_page_explains_each_field(beginning, struct):
    table = prose(DOCS / "reference" / "api.md").partition(beginning)[2].strip().partition("\n\n")[0]
    names = [
        name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    assert set(names) == set(encoded_names(struct))


def test_the_api_page_lists_the_fields_of_an_attempt():
    (listed,) = re.findall(r"`attempts` \| `\[\{(.*?)\}\]`", prose(DOCS / "reference" / "api.md"))
    assert listed.split(", ") == encoded_names(Attempt)
