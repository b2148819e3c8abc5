"""The composition root: the only module that knows all concrete parts."""

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog
from aiohttp import web

from opsentry.api import operator, v1
from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.operator_queries import OperatorQueries
from opsentry.application.readiness import Readiness
from opsentry.application.subscriptions import disable_subscription
from opsentry.events.appender import Appender
from opsentry.events.codec import Actor
from opsentry.events.command_handler import CommandHandler
from opsentry.http import health, openapi
from opsentry.http.context import Dependencies
from opsentry.http.server import create_app
from opsentry.identity.api_tokens import ApiTokens
from opsentry.identity.operator_tokens import OperatorTokens
from opsentry.infrastructure.encryption import SecretBox
from opsentry.infrastructure.postgres import Database
from opsentry.infrastructure.rate_limit import RateLimiter
from opsentry.infrastructure.redis import connect
from opsentry.notifications.channel import Channel
from opsentry.notifications.channels import Dependencies as ChannelParts
from opsentry.notifications.channels import channels
from opsentry.notifications.delivery.service import LEASE_SECONDS, DeliveryService
from opsentry.notifications.messages.builder import MessageBuilder
from opsentry.notifications.transport.egress import http_session
from opsentry.projections.as_of import AsOfQueries
from opsentry.projections.engine.projection import Projection
from opsentry.projections.engine.projector import Projector
from opsentry.projections.impact import Impact
from opsentry.projections.incidents import Incidents
from opsentry.projections.maintenance import MaintenanceWindows
from opsentry.projections.outbox.projection import Outbox
from opsentry.projections.services import ServiceLinkLoader, Services
from opsentry.projections.subscriptions import Subscriptions
from opsentry.public.routes import pages
from opsentry.settings import Settings
from opsentry.worker.worker import Worker

_log = structlog.get_logger()

KEEPALIVE_SECONDS = 75
# A server that responds before it has read the whole body waits this long for the rest before it disconnects.
LINGER_SECONDS = 2
# PostgreSQL connections of a sender: leasing, recording results and building messages each need some.
SENDER_POOL = 8
# A Redis command times out before the readiness check that sends it, so that the check can report the cause. No request
# waits for Redis.
REDIS_SHARE = 0.8


OPERATIONS = (*health.OPERATIONS, *openapi.OPERATIONS, *operator.OPERATIONS, *v1.OPERATIONS)


def projections() -> list[Projection]:
    """Return an instance of each projection."""
    return [Services(), Incidents(), MaintenanceWindows(), Subscriptions(), Impact(), Outbox()]


def new_database(settings: Settings, size: int) -> Database:
    """Return a pool of at most `size` connections, with the timeout of the settings. It is not open yet."""
    return Database(settings.database_url, size=size, timeout_seconds=settings.database_timeout_ms / 1000)


@dataclass(frozen=True, slots=True)
class Core:
    """The parts that every process has: ledger, projections and use cases."""

    settings: Settings
    database: Database
    appender: Appender
    projector: Projector
    application: Application


@asynccontextmanager
async def core(settings: Settings) -> AsyncIterator[Core]:
    """Build the parts. On exit, finish open appends, then close."""
    async with AsyncExitStack() as stack:
        database = new_database(settings, settings.database_pool_size)
        await database.open()
        stack.push_async_callback(database.close)
        appender = Appender(database)
        stack.push_async_callback(appender.drain)
        projector = Projector(database, projections())
        application = Application(
            database=database,
            appender=appender,
            command_handler=CommandHandler(database, appender),
            projector=projector,
            as_of_queries=AsOfQueries(database, projector),
            service_links=ServiceLinkLoader(projector),
            channels=await _open_channels(stack, settings),
            secret_box=SecretBox(settings.encryption_keys),
        )
        yield Core(settings, database, appender, projector, application)


async def _open_channels(stack: AsyncExitStack, settings: Settings) -> Mapping[str, Channel]:
    """Return the channels. They close with the stack."""
    http = await stack.enter_async_context(
        http_session(settings.webhook_allowed_networks, settings.max_concurrent_deliveries)
    )
    opened = channels(ChannelParts(settings, http))
    for channel in opened.values():
        stack.push_async_callback(channel.close)
    return opened


@asynccontextmanager
async def serving(
    settings: Settings, parts: Core, *, host: str | None = None, port: int | None = None
) -> AsyncIterator[str]:
    """Serve HTTP and yield the base URL. `host` and `port` override the settings."""
    async with AsyncExitStack() as stack:
        client = connect(settings.redis_url, REDIS_SHARE * settings.readiness_timeout_ms / 1000)
        stack.push_async_callback(client.aclose)
        probe = Database(settings.database_url, size=2, timeout_seconds=settings.readiness_timeout_ms / 1000)
        await probe.open()
        stack.push_async_callback(probe.close)
        limiter = RateLimiter(client, settings.rate_limit, "requests")
        failures = RateLimiter(client, settings.auth_failure_rate_limit, "failures")
        sign_ups = RateLimiter(client, settings.subscribe_rate_limit, "sign_ups")
        for counts in (limiter, failures, sign_ups):
            stack.push_async_callback(counts.close)
        application = parts.application
        api_tokens, operator_tokens = ApiTokens(parts.database), OperatorTokens(parts.database)
        dependencies = Dependencies(settings, application, api_tokens, operator_tokens, limiter, failures)
        app = create_app(dependencies, OPERATIONS, pages(dependencies, sign_ups))
        app[openapi.DOCUMENT] = msgspec.json.encode(openapi.build_document(OPERATIONS))
        app[health.DEPENDENCIES] = dependencies
        app[health.READINESS] = Readiness(probe, client)
        app[operator.OPERATOR_QUERIES] = OperatorQueries(parts.database, parts.projector.projections)
        web_runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=KEEPALIVE_SECONDS,
            lingering_time=LINGER_SECONDS,
            shutdown_timeout=5,
            handle_signals=False,
        )
        await web_runner.setup()
        stack.push_async_callback(web_runner.cleanup)
        site = web.TCPSite(web_runner, host or settings.host, settings.port if port is None else port, backlog=1024)
        await site.start()
        bound, number = web_runner.addresses[0][:2]
        yield base_url_of(bound, number)


def base_url_of(host: str, port: int) -> str:
    """Return the base URL of a server that listens on `host` and `port`."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class LedgerSubscriptionDisabler:
    """Disables subscriptions for the sender, by a command that the tenant's ledger records."""

    def __init__(self, application: Application) -> None:
        self._application = application

    async def disable(
        self, tenant_id: int, subscription_id: int, *, reason: str, target: str, encrypted_secret: str | None
    ) -> bool:
        """Disable a subscription; see `SubscriptionDisabler`."""
        return await disable_subscription(
            self._application,
            Caller(tenant_id=tenant_id, actor=Actor("sender")),
            subscription_id,
            reason=reason,
            target=target,
            encrypted_secret=encrypted_secret,
        )


@asynccontextmanager
async def sending(parts: Core, *, lease: float = LEASE_SECONDS) -> AsyncIterator[None]:
    """Send due deliveries. On exit, finish open attempts. `lease` is in seconds, see `DeliveryService`."""
    settings = parts.settings
    async with AsyncExitStack() as stack:
        # Connections of its own: sending and catching up do not wait for each other.
        database = new_database(settings, SENDER_POOL)
        await database.open()
        stack.push_async_callback(database.close)
        known = await _open_channels(stack, settings)
        sender = DeliveryService(
            database,
            LedgerSubscriptionDisabler(parts.application),
            MessageBuilder(AsOfQueries(database, parts.projector), database),
            known,
            SecretBox(settings.encryption_keys),
            max_concurrent_deliveries=settings.max_concurrent_deliveries,
            coalesce_seconds=settings.coalesce_seconds,
            lease_seconds=lease,
        )
        sender.start()
        stack.push_async_callback(sender.stop)
        yield


@asynccontextmanager
async def working(parts: Core, heartbeat: Path | None = None) -> AsyncIterator[None]:
    """Run the worker's loops and the sender. The worker touches the file `heartbeat` after each round."""
    worker = Worker(
        parts.application,
        idempotency_key_ttl_hours=parts.settings.idempotency_key_ttl_hours,
        delivery_retention_days=parts.settings.delivery_retention_days,
        maintenance_reminder_minutes=parts.settings.maintenance_reminder_minutes,
        heartbeat=heartbeat,
    )
    worker.start()
    try:
        async with sending(parts):
            yield
    finally:
        worker.stop()


async def until_stopped() -> None:
    """Return at SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


def configure_logging(level: str) -> None:
    """Send structured lines to standard error, one JSON object each."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING)
    # That a job is not begun again while it still runs is as it should be, and no warning.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
