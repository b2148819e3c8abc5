"""What the documentation points to is there, and its table of endpoints has all of them."""

import re
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from opsentry.api.app import create_app

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def prose(page):
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_is_named_is_there(page):
    for path in re.findall(r"`((?:docs|opsentry|migrations|tests|bench)/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), path


def test_every_page_is_led_to_from_the_first():
    linked = set(re.findall(r"\]\(([^)#]+)", prose(ROOT / "README.md")))
    assert {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md"} <= linked


def test_the_table_of_endpoints_has_all_of_them():
    app = create_app(MagicMock(), MagicMock(), MagicMock(), {})
    there = set()
    for route in app.router.routes():
        if route.resource is not None and route.method not in {"HEAD", "*"}:
            for action in ("start", "complete", "cancel"):
                path = route.resource.canonical.replace("{action}", action)
                there.add((route.method, re.sub(r"\{\w+\}", ":id", path)))
    table = prose(ROOT / "docs" / "api.md").partition("## Endpoints")[2].partition("\n## ")[0]
    told = set()
    for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE):
        base = "" if "(no `/api/v1`)" in row else "/api/v1"
        told |= {(method, base + path) for method, path in re.findall(r"`([A-Z]+) (/[^`]*)`", row)}
    assert told == there
