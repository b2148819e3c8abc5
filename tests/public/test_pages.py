import base64
import re
from dataclasses import replace
from hashlib import sha256

import pytest

from opsentry.bootstrap import core, serving
from opsentry.demo.embedded import APP_USER, EmbeddedPostgres
from opsentry.identity import tenants
from opsentry.public.pages import _wait
from tests.conftest import META, make_service
from tests.public.conftest import Browser, heading

HOSTILE = "</title><script>alert('x')</script>\" onload=x {{ 7*7 }}"


async def pages(browser, links, acme):
    yield await browser.get("/status/acme/subscribe")
    yield await browser.sign_up(email="nobody")
    yield await browser.get("/status/acme/subscribe/sent")
    yield await browser.get("/status/nobody/subscribe")
    for purpose in ("confirm", "unsubscribe"):
        yield await browser.get(f"/{purpose}/{links.token(purpose, acme.id, 1)}")
        yield await browser.get(f"/{purpose}/x")


async def test_every_page_has_the_security_headers(browser, acme, links):
    async for _, text, headers in pages(browser, links, acme):
        policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
        (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
        digest = base64.b64encode(sha256(style.encode()).digest()).decode()
        assert policy == {
            "default-src": "'none'",
            "style-src": f"'sha256-{digest}'",
            "form-action": "'self'",
            "frame-ancestors": "'none'",
            "base-uri": "'none'",
        }
        assert not re.findall(r" style=|<script| on\w+=|https?://", text)
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["X-Request-ID"]
        assert "Set-Cookie" not in headers


async def test_names_are_escaped(browser, parts):
    async with parts.database.connection() as connection:
        tenant_id = await tenants.create_tenant(connection, slug="hostile", name=HOSTILE, meta=META)
    await make_service(parts, tenant_id, "s", name=HOSTILE)
    for path in ("/status/hostile/subscribe", "/status/hostile/subscribe/sent"):
        _, text, _ = await browser.get(path)
        assert "&lt;script&gt;" in text
        assert "<script" not in text
        assert "{{ 7*7 }}" in text
        assert text.count("</title>") == 1


async def test_other_methods_get_an_error_page(browser, acme):
    for path, allowed in (
        ("/status/acme/subscribe", "GET, HEAD, POST"),
        ("/status/acme/subscribe/sent", "GET, HEAD"),
        ("/confirm/x", "GET, HEAD, POST"),
        ("/unsubscribe/x", "GET, HEAD, POST"),
    ):
        for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
            status, text, headers = await browser.send(method, path)
            assert (status, headers["Allow"]) == (405, allowed)
            assert "<h1>" in text
    status, text, headers = await browser.send("HEAD", "/status/acme/subscribe")
    assert (status, text) == (200, "")
    assert int(headers["Content-Length"]) > 1000


@pytest.fixture
async def without_database(settings, tmp_path, http):
    """A browser at a server whose database is down from the start."""
    server = EmbeddedPostgres(tmp_path / "postgres")
    server.start()
    own = replace(settings, database_url=server.url("postgres", APP_USER))
    server.stop("immediate")
    async with core(own) as parts, serving(own, parts) as url:
        yield Browser(http, url)


async def test_pages_say_that_they_are_unavailable_without_the_database(without_database, links):
    for status, text, headers in (
        await without_database.get("/status/acme/subscribe"),
        await without_database.sign_up(),
        await without_database.post(f"/unsubscribe/{links.token('unsubscribe', 1, 1)}"),
    ):
        assert (status, headers["Retry-After"]) == (503, "1")
        assert heading(text) == "This page is unavailable right now"
        assert "database" not in text
        assert headers["X-Request-ID"] in text


async def test_a_defect_shows_no_details(browser, acme, monkeypatch):
    async def broken(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(tenants, "find_tenant", broken)
    status, text, headers = await browser.get("/status/acme/subscribe")
    assert (status, "secret detail" in text) == (500, False)
    assert headers["X-Request-ID"] in text


@pytest.mark.parametrize(
    ("retry_after", "wait"), [("", "a minute"), ("1", "a minute"), ("61", "2 minutes"), ("3600", "60 minutes")]
)
def test_the_wait_is_rounded_up_to_minutes(retry_after, wait):
    assert _wait(retry_after) == wait
