import asyncio
import ssl
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult

from opsentry.notifications.channel import BadTarget, Outcome
from opsentry.notifications.channels import Dependencies, email
from opsentry.notifications.transport import smtp
from opsentry.settings import Settings
from tests.notifications.mail import SETTINGS, parsed
from tests.notifications.messages import endpoint, message
from tests.waiting import until


class Inbox:
    """A mail relay that keeps what it takes; a test may have it refuse something."""

    def __init__(self) -> None:
        self.letters: list[Any] = []
        self.connections = 0
        self.refusals: dict[str, str] = {}

    async def handle_EHLO(self, server, session, envelope, hostname, responses):  # noqa: ARG002, N802
        session.host_name = hostname
        return responses

    async def handle_MAIL(self, server, session, envelope, address, options):  # noqa: ARG002, N802
        envelope.mail_from = address
        return self.refusals.get("MAIL", "250 OK")

    async def handle_RCPT(self, server, session, envelope, address, options):  # noqa: ARG002, N802
        if "RCPT" in self.refusals:
            return self.refusals["RCPT"]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):  # noqa: ARG002, N802
        if "DATA" not in self.refusals:
            self.letters.append((envelope.mail_from, envelope.rcpt_tos, envelope.content))
        return self.refusals.get("DATA", "250 OK")

    @asynccontextmanager
    async def open(self, port=0, **options):
        """Listen; yields the relay's address."""
        loop = asyncio.get_running_loop()
        tls = options.pop("implicit", None)

        sessions = []

        def made():
            self.connections += 1
            session = SMTP(self, loop=loop, hostname="mx.example", enable_SMTPUTF8=False, **options)
            sessions.append(session)
            return session

        server = await loop.create_server(made, "127.0.0.1", port, ssl=tls)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for session in sessions:
                if session.transport is not None:
                    session.transport.close()
            await until(no_session)


async def no_session():
    """Whether every session of a relay has ended."""
    return not any("_handle_client" in repr(task.get_coro()) for task in asyncio.all_tasks())


@asynccontextmanager
async def channel_to(url):
    made = email.make(Dependencies(replace(SETTINGS, smtp_url=url), None))  # type: ignore[arg-type]
    yield made
    await made.close()


# ------------------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    "address",
    ["kim@example.com", "Kim.O'Hara+status@mail.example.co.uk", "kim@b\u00fccher.example", "a@xn--bcher-kva.example"],
)
def test_valid_addresses_are_kept_unchanged(address):
    channel = email.make(Dependencies(SETTINGS, None))  # type: ignore[arg-type]
    assert channel.validate_target(address) == channel.display_target(address) == address
    assert (channel.name, channel.signs_messages, channel.has_secret_target) == ("email", False, False)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "kim",
        "@example.com",
        "kim@",
        "kim@example",
        "kim@.com",
        "kim@example..com",
        "kim@-example.com",
        "kim@example.com.",
        "kim@example.1",
        "kim@127.0.0.1",
        "kim@[127.0.0.1]",
        "kim@example.com\n",
        "kim@example.com\r\nBcc: robin@example.com",
        "kim\n@example.com",
        "kim @example.com",
        "Kim <kim@example.com>",
        "kim@example.com, robin@example.com",
        "kim@robin@example.com",
        '"kim"@example.com',
        ".kim@example.com",
        "kim..o@example.com",
        "k\u00efm@example.com",
        "kim@exa\u202emple.com ",
        "mailto:kim@example.com",
        "k" * 65 + "@example.com",
        "kim@" + "e" * 64 + ".com",
        "kim@" + "example." * 40 + "com",
    ],
)
def test_invalid_addresses_are_refused(address):
    with pytest.raises(BadTarget):
        email.make(Dependencies(SETTINGS, None)).validate_target(address)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the pool


async def test_emails_in_sequence_share_one_connection():
    inbox = Inbox()
    async with inbox.open() as address, channel_to(f"smtp://{address}") as channel:
        for number in range(3):
            sent = message(id=f"msg_{number}")
            assert await channel.send(endpoint("kim@b\u00fccher.example"), sent) == Outcome(response_status=250)
        assert inbox.connections == 1
    assert [(sender, to) for sender, to, _ in inbox.letters] == [
        ("status@acme.example", ["kim@xn--bcher-kva.example"])
    ] * 3
    letters = [parsed(raw) for _, _, raw in inbox.letters]
    assert [letter["Message-ID"] for letter in letters] == [f"<msg_{n}@acme.example>" for n in range(3)]
    assert letters[0]["To"] == "kim@xn--bcher-kva.example"


async def test_each_email_in_flight_has_its_own_connection():
    inbox = Inbox()
    async with inbox.open() as address, channel_to(f"smtp://{address}") as channel:
        for _ in range(3):
            many = [
                channel.send(endpoint("kim@example.com"), message(id=f"msg_{n}"))
                for n in range(channel.max_concurrency)
            ]
            assert set(await asyncio.gather(*many)) == {Outcome(response_status=250)}
        assert inbox.connections == channel.max_concurrency == 8
    assert len(inbox.letters) == 24


async def test_a_connection_that_the_relay_closed_is_replaced():
    inbox = Inbox()
    async with inbox.open(timeout=0.5) as address, channel_to(f"smtp://{address}") as channel:
        assert (await channel.send(endpoint("kim@example.com"), message())).error is None
        await until(no_session)
        assert (await channel.send(endpoint("kim@example.com"), message())).error is None
    assert (inbox.connections, len(inbox.letters)) == (2, 2)


async def test_idle_connections_are_closed(monkeypatch):
    monkeypatch.setattr(smtp, "_IDLE_SECONDS", 0.1)
    inbox = Inbox()
    async with inbox.open() as address, channel_to(f"smtp://{address}") as channel:
        assert (await channel.send(endpoint("kim@example.com"), message())).error is None
        await until(no_session)
        assert (await channel.send(endpoint("kim@example.com"), message())).error is None
    assert inbox.connections == 2


@pytest.mark.parametrize("answer", ["550 No such user \x01 here", "451 Try later"])
async def test_a_refused_address_is_no_internal_failure(answer):
    inbox = Inbox()
    inbox.refusals["RCPT"] = answer
    async with inbox.open() as address, channel_to(f"smtp://{address}") as channel:
        outcome = await channel.send(endpoint("kim@example.com"), message())
        assert outcome.response_status == int(answer[:3])
        assert outcome.error == f"the mail relay answered {answer[:3]} for this address"
        assert not outcome.internal_failure
        inbox.refusals.clear()
        assert (await channel.send(endpoint("kim@example.com"), message())).error is None
    assert inbox.connections == 1


@pytest.mark.parametrize(
    ("step", "answer", "outcome"),
    [
        ("MAIL", "554", Outcome("the mail relay answered 554", 554, internal_failure=True)),
        ("DATA", "452", Outcome("the mail relay answered 452 to the message", 452, internal_failure=True)),
        ("DATA", "554", Outcome("the mail relay answered 554 to the message", 554)),
    ],
)
async def test_other_rejections_are_internal_failures_unless_permanent_for_the_message(step, answer, outcome):
    inbox = Inbox()
    inbox.refusals[step] = f"{answer} 5.7.1 relay-7.internal says no"
    async with inbox.open() as address, channel_to(f"smtp://{address}") as channel:
        assert await channel.send(endpoint("kim@example.com"), message()) == outcome
        inbox.refusals.clear()
        assert (await channel.send(endpoint("kim@example.com"), message())).error is None


async def test_an_unreachable_relay_is_an_internal_failure(unused_tcp_port):
    async with channel_to("") as channel:
        outcome = await channel.send(endpoint("kim@example.com"), message())
        assert outcome == Outcome("no mail relay is set up (OPSENTRY_SMTP_URL)", internal_failure=True)
    async with channel_to(f"smtp://user:hidden@127.0.0.1:{unused_tcp_port}") as channel:
        outcome = await channel.send(endpoint("kim@example.com"), message())
        assert outcome == Outcome("no connection to the mail relay", internal_failure=True)
    async with channel_to("smtp://nowhere.invalid") as channel:
        outcome = await channel.send(endpoint("kim@example.com"), message())
        assert outcome == Outcome("no connection to the mail relay", internal_failure=True)


async def test_a_silent_relay_opens_the_circuit(monkeypatch):
    monkeypatch.setattr(smtp, "SEND_TIMEOUT_SECONDS", 1.0)
    asked = []

    async def silence(reader, _):
        asked.append(1)
        await reader.read()

    silent = await asyncio.start_server(silence, "127.0.0.1", 0)
    said_nothing = Outcome("no answer from the mail relay within 1.0 s", internal_failure=True)
    async with silent, channel_to(f"smtp://127.0.0.1:{silent.sockets[0].getsockname()[1]}") as channel:
        for _ in range(3):
            assert await channel.send(endpoint("kim@example.com"), message()) == said_nothing
    assert asked == [1]


async def test_the_circuit_closes_after_a_pause(monkeypatch, unused_tcp_port):
    monkeypatch.setattr(smtp, "CIRCUIT_OPEN_SECONDS", 0.1)
    async with channel_to(f"smtp://127.0.0.1:{unused_tcp_port}") as channel:
        assert (await channel.send(endpoint("kim@example.com"), message())).internal_failure
        inbox = Inbox()
        async with inbox.open(port=unused_tcp_port):

            async def sent():
                return (await channel.send(endpoint("kim@example.com"), message())).error is None

            await until(sent)
    assert len(inbox.letters) == 1


async def test_a_missing_encryption_key_is_an_internal_failure():
    made = email.make(Dependencies(Settings(smtp_url="smtp://127.0.0.1:1"), None))  # type: ignore[arg-type]
    outcome = await made.send(endpoint("kim@example.com"), message())
    assert outcome.internal_failure
    assert outcome.error is not None
    assert "OPSENTRY_ENCRYPTION_KEYS" in outcome.error


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS", "ignore:Session.login_data")
async def test_login_needs_tls_and_a_wrong_password_is_reported(certified, monkeypatch):
    asked = []

    def check(server, session, envelope, mechanism, data):
        asked.append(data.login)
        return AuthResult(success=(data.login, data.password) == (b"user@acme", b"p:ss/w@rd"), handled=False)

    context, file = certified
    trusting = ssl.create_default_context(cafile=file)
    trusting.check_hostname = False
    monkeypatch.setattr(smtp.SmtpPool, "_tls_context", trusting)
    inbox = Inbox()
    options = {"authenticator": check, "auth_required": True, "auth_require_tls": False}
    async with inbox.open(**options, tls_context=context) as address:
        async with channel_to(f"smtp://user%40acme:p%3Ass%2Fw%40rd@{address}") as channel:
            assert (await channel.send(endpoint("kim@example.com"), message())).error is None
        async with channel_to(f"smtp://user%40acme:wrong@{address}") as channel:
            outcome = await channel.send(endpoint("kim@example.com"), message())
            assert outcome == Outcome("the mail relay rejected our login", 535, internal_failure=True)
    assert asked.pop() == b"user@acme"
    asked.clear()
    async with inbox.open(**options) as address, channel_to(f"smtp://user%40acme:p%3Ass%2Fw%40rd@{address}") as channel:
        outcome = await channel.send(endpoint("kim@example.com"), message())
    assert outcome == Outcome("the mail relay cannot be used", internal_failure=True)
    assert asked == []


async def test_tls_is_used_if_offered_and_certificates_are_verified(certified, monkeypatch):
    context, file = certified
    inbox = Inbox()
    trusting = ssl.create_default_context(cafile=file)
    trusting.check_hostname = False
    starttls, implicit = inbox.open(tls_context=context, require_starttls=True), inbox.open(implicit=context)
    async with starttls as first, implicit as second:
        for url in (f"smtp://{first}", f"smtps://{second}"):
            async with channel_to(url) as channel:
                outcome = await channel.send(endpoint("kim@example.com"), message())
                assert outcome == Outcome("no secure connection to the mail relay", internal_failure=True)
        monkeypatch.setattr(smtp.SmtpPool, "_tls_context", trusting)
        for url in (f"smtp://{first}", f"smtps://{second}"):
            async with channel_to(url) as channel:
                assert (await channel.send(endpoint("kim@example.com"), message())).error is None
    assert len(inbox.letters) == 2
