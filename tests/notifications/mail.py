"""Give the tests of the channel `email` their settings, and parse emails as a mail program does."""

from email import message_from_bytes, policy

from opsentry.infrastructure.encryption import generate_key
from opsentry.settings import Settings

SETTINGS = Settings(
    encryption_keys=(generate_key(),),
    mail_from="Acme Status <status@acme.example>",
    public_url="https://status.acme.example/a/long/way/down/until/the/line/of/a/header/is/full",
)


def parsed(raw):
    """Return the parsed email, after a check that it has no defects."""
    assert all(len(line) <= 998 for line in raw.split(b"\r\n"))
    assert raw.count(b"\n") == raw.count(b"\r\n")
    assert raw.isascii()
    email = message_from_bytes(raw, policy=policy.default)
    for part in email.walk():
        assert not part.defects
        for name, value in part.items():
            assert not value.defects, name
    return email
