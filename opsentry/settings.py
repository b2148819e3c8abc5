"""All settings, in one place: environment variables `OPSENTRY_*` with their defaults."""

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class InvalidSettings(Exception):
    """One or more settings cannot be used; the message has a line for each."""


def _text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        try:
            parts = urlsplit(value)
            usable = parts.scheme in schemes and (parts.port is None or parts.port > 0)
        except ValueError:
            usable = False
        if not usable:  # the value itself may hold a password and is not repeated
            raise ValueError(f"must be a URL that begins with {' or '.join(f'{scheme}:' for scheme in schemes)}")
        return value

    return parse


_POSTGRES = _url("postgresql", "postgres")


def _number(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"\d{1,9}", value) or not lowest <= int(value) <= highest:
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return int(value)

    return parse


def _rate(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,8}/(second|minute|hour|day)", value):
        raise ValueError("must look like 600/minute (or /second, /hour, /day)")
    return value


def _networks(value: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in value.split(",") if part.strip())
    except ValueError:
        raise ValueError("must be addresses or networks separated by commas, such as 10.0.0.0/8") from None


def _secret_keys(value: str) -> tuple[str, ...]:
    keys = tuple(part.strip() for part in value.split(",") if part.strip())
    if any(not re.fullmatch(r"[A-Za-z0-9_-]{43}=", key) for key in keys):  # not repeated: they are secrets
        raise ValueError("must be one or more keys as `opsentry secret-key` prints them, separated by commas")
    return keys


def _log_level(value: str) -> str:
    if value not in {"debug", "info", "warning", "error"}:
        raise ValueError("must be one of debug, info, warning, error")
    return value


def _setting(default: Any, parse: Callable[[str], Any], says: str) -> Any:
    return field(default=default, metadata={"parse": parse, "says": says})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set from outside. The variable of `database_url` is `OPSENTRY_DATABASE_URL`, and so on."""

    database_url: str = _setting(
        "postgresql://localhost:5432/opsentry", _POSTGRES, "PostgreSQL 16 or later, as a member of role opsentry_app"
    )
    migration_database_url: str = _setting(
        "",
        lambda value: value and _POSTGRES(value),
        "the same database as its owner, for `opsentry migrate`; empty: as OPSENTRY_DATABASE_URL",
    )
    redis_url: str = _setting(
        "redis://localhost:6379/0", _url("redis", "rediss", "unix"), "Redis or Valkey; nothing in it needs keeping"
    )
    host: str = _setting("127.0.0.1", _text, "address that `opsentry serve` listens on")
    port: int = _setting(8080, _number(0, 65535), "port that `opsentry serve` listens on; 0 takes a free one")
    database_pool_size: int = _setting(16, _number(2, 1000), "PostgreSQL connections of one process, at most")
    rate_limit: str = _setting("600/minute", _rate, "requests of one token from one address")
    auth_failure_rate_limit: str = _setting("60/minute", _rate, "failed authentications from one address")
    subscribe_rate_limit: str = _setting(
        "10/hour", _rate, "subscriptions by e-mail asked for from one address, on its page"
    )
    trusted_proxies: tuple[Network, ...] = _setting(
        (), _networks, "networks whose X-Forwarded-For is believed, separated by commas"
    )
    idempotency_key_ttl_hours: int = _setting(
        48, _number(24, 8760), "hours that an Idempotency-Key is remembered, at least"
    )
    request_body_timeout_seconds: int = _setting(
        10, _number(1, 3600), "seconds that a request may take to arrive whole"
    )
    encryption_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata={
            "parse": _secret_keys,
            "says": "keys that seal secrets of subscriptions, from `opsentry secret-key`; the first seals, all open",
        },
    )
    public_url: str = _setting(
        "http://localhost:8080", _url("http", "https"), "where people and mail programs reach `opsentry serve`"
    )
    smtp_url: str = _setting(
        "",
        lambda value: value and _url("smtp", "smtps")(value),
        "mail relay, such as smtp://user:password@mail.example.com:587; empty: no e-mail is sent",
    )
    mail_from: str = _setting("Opsentry <opsentry@localhost>", _text, "sender of e-mails")
    webhook_allowed_networks: tuple[Network, ...] = _setting(
        (), _networks, "private networks that webhooks may be sent to, separated by commas; all public ones are open"
    )
    coalesce_seconds: int = _setting(2, _number(0, 3600), "changes of one incident within so long become one message")
    maintenance_reminder_minutes: int = _setting(
        60, _number(0, 10080), "how long before its start people are reminded of a window; 0: never"
    )
    max_concurrent_deliveries: int = _setting(
        256, _number(4, 10_000), "messages that one worker sends at once on a channel, at most"
    )
    delivery_retention_days: int = _setting(90, _number(1, 3650), "days that what came of a message is kept")
    log_level: str = _setting("info", _log_level, "debug, info, warning or error")

    @classmethod
    def variable(cls, name: str) -> str:
        """Return the environment variable of the setting `name`."""
        return f"OPSENTRY_{name.upper()}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings; unset variables take their defaults.

        Raises:
            InvalidSettings: Names every variable that cannot be used, not only the first.
        """
        values: dict[str, Any] = {}
        problems = []
        for setting in fields(cls):
            raw = environment.get(cls.variable(setting.name))
            if raw is None:
                continue
            try:
                values[setting.name] = setting.metadata["parse"](raw)
            except ValueError as error:
                problems.append(f"{cls.variable(setting.name)}: {error}")
        if problems:
            raise InvalidSettings("\n".join(problems))
        return cls(**values)

    @classmethod
    def catalogue(cls) -> list[tuple[str, str, str]]:
        """Return (variable, default, what it is) of every setting."""
        return [
            (cls.variable(setting.name), str(setting.default or ""), str(setting.metadata["says"]))
            for setting in fields(cls)
        ]
