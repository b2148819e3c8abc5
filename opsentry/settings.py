"""Read the settings from environment variables `OPSENTRY_*` and check them."""

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class InvalidSettings(Exception):
    """At least one setting has an unusable value. The message has a line for each."""


class SettingDescription(NamedTuple):
    """Describes one setting to operators.

    Attributes:
        variable: Name of the environment variable.
        default: Value where the variable is unset; empty if there is none.
        meaning: Meaning and unit of the value.
    """

    variable: str
    default: str
    meaning: str


def _text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        try:
            parts = urlsplit(value)
            is_valid = parts.scheme in schemes and (parts.port is None or parts.port > 0)
        except ValueError:
            is_valid = False
        if not is_valid:
            # The message must not repeat the value, which may contain a password.
            raise ValueError(f"must be a URL that begins with {' or '.join(f'{scheme}:' for scheme in schemes)}")
        return value

    return parse


def _optional(parse: Callable[[str], str]) -> Callable[[str], str]:
    return lambda value: parse(value) if value else value


def _integer(lowest: int, highest: int) -> Callable[[str], int]:
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


def _encryption_keys(value: str) -> tuple[str, ...]:
    keys = tuple(part.strip() for part in value.split(",") if part.strip())
    if any(not re.fullmatch(r"[A-Za-z0-9_-]{43}=", key) for key in keys):
        # The message must not repeat the value, which is secret.
        raise ValueError("must be keys from `opsentry keys generate`, separated by commas")
    return keys


def _log_level(value: str) -> str:
    if value not in {"debug", "info", "warning", "error"}:
        raise ValueError("must be one of debug, info, warning, error")
    return value


def _setting(default: T, parse: Callable[[str], T], meaning: str, *, is_secret: bool = False) -> T:
    return field(default=default, repr=not is_secret, metadata={"parse": parse, "meaning": meaning})


_postgres_url = _url("postgresql", "postgres")
_no_networks: tuple[Network, ...] = ()
_no_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Hold every setting. `OPSENTRY_DATABASE_URL` sets `database_url`; the others follow the same rule."""

    # Servers
    database_url: str = _setting(
        "postgresql://localhost:5432/opsentry",
        _postgres_url,
        "PostgreSQL 16 or later; the login is a member of the role opsentry_app",
    )
    migration_database_url: str = _setting(
        "",
        _optional(_postgres_url),
        "the same database as its owner, for `opsentry migrate`; empty: OPSENTRY_DATABASE_URL",
    )
    database_pool_size: int = _setting(16, _integer(2, 1000), "maximum PostgreSQL connections of a process")
    database_timeout_ms: int = _setting(
        900, _integer(100, 600_000), "milliseconds that a request waits for PostgreSQL before it fails with 503"
    )
    redis_url: str = _setting(
        "redis://localhost:6379/0", _url("redis", "rediss", "unix"), "Redis or Valkey; its contents may be lost"
    )
    readiness_timeout_ms: int = _setting(
        500, _integer(100, 600_000), "milliseconds after which a check of /health/ready fails"
    )

    # HTTP
    host: str = _setting("127.0.0.1", _text, "address that `opsentry serve` listens on")
    port: int = _setting(8080, _integer(0, 65535), "port that `opsentry serve` listens on; 0: any free port")
    public_url: str = _setting(
        "http://localhost:8080", _url("http", "https"), "base URL of `opsentry serve` for readers; begins e-mail links"
    )
    trusted_proxies: tuple[Network, ...] = _setting(
        _no_networks, _networks, "networks whose X-Forwarded-For header is trusted, separated by commas"
    )
    request_body_timeout_seconds: int = _setting(
        10, _integer(1, 3600), "seconds within which a request body must arrive"
    )
    idempotency_key_ttl_hours: int = _setting(
        48, _integer(24, 8760), "minimum hours for which an Idempotency-Key is kept"
    )
    rate_limit: str = _setting("600/minute", _rate, "maximum requests of one token from one address")
    auth_failure_rate_limit: str = _setting("60/minute", _rate, "maximum failed authentications from one address")
    subscribe_rate_limit: str = _setting("10/hour", _rate, "maximum e-mail sign-ups on public pages from one address")

    # Notifications
    encryption_keys: tuple[str, ...] = _setting(
        _no_keys,
        _encryption_keys,
        "keys from `opsentry keys generate` for subscription secrets, separated by commas; the first encrypts, all"
        " decrypt",
        is_secret=True,
    )
    smtp_url: str = _setting(
        "",
        _optional(_url("smtp", "smtps")),
        "mail relay, such as smtp://user:password@mail.example.com:587; empty: e-mails are not sent",
    )
    mail_from: str = _setting("Opsentry <opsentry@localhost>", _text, "From address of e-mails")
    webhook_allowed_networks: tuple[Network, ...] = _setting(
        _no_networks,
        _networks,
        "private networks that webhooks may reach, separated by commas; public addresses are always allowed",
    )
    coalesce_seconds: int = _setting(
        2, _integer(0, 3600), "seconds within which changes of one incident coalesce into one message"
    )
    maintenance_reminder_minutes: int = _setting(
        60, _integer(0, 10080), "minutes between a reminder and the start of its maintenance window; 0: no reminders"
    )
    max_concurrent_deliveries: int = _setting(
        256, _integer(4, 10_000), "maximum deliveries in flight of one worker on one channel"
    )
    delivery_retention_days: int = _setting(90, _integer(1, 3650), "days for which final deliveries are kept")

    # Logs
    log_level: str = _setting("info", _log_level, "debug, info, warning or error")

    @classmethod
    def variable(cls, name: str) -> str:
        """Return the environment variable of the setting `name`."""
        return f"OPSENTRY_{name.upper()}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings. Unset variables take their defaults.

        Raises:
            InvalidSettings: At least one value is unusable. The message names every such variable.
        """
        values: dict[str, Any] = {}  # each parser returns the type of its own field
        problems = []
        for setting in fields(cls):
            variable = cls.variable(setting.name)
            if (raw := environment.get(variable)) is None:
                continue
            try:
                values[setting.name] = setting.metadata["parse"](raw)
            except ValueError as error:
                problems.append(f"{variable}: {error}")
        if problems:
            raise InvalidSettings("\n".join(problems))
        return cls(**values)

    @classmethod
    def describe(cls) -> list[SettingDescription]:
        """Return the description of every setting, ordered by topic."""
        return [
            SettingDescription(cls.variable(setting.name), str(setting.default or ""), str(setting.metadata["meaning"]))
            for setting in fields(cls)
        ]
