"""The parts that use cases work with."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from opsentry.events.appender import Appender
from opsentry.events.command_handler import CommandHandler
from opsentry.infrastructure.encryption import SecretBox
from opsentry.infrastructure.postgres import Database
from opsentry.notifications.channel import Channel
from opsentry.projections.as_of import AsOfQueries
from opsentry.projections.engine.projector import Projector
from opsentry.projections.services import ServiceLinkLoader


@dataclass(frozen=True, slots=True)
class Application:
    """The parts of one process; `bootstrap` builds them."""

    database: Database
    appender: Appender
    command_handler: CommandHandler
    projector: Projector
    as_of_queries: AsOfQueries
    service_links: ServiceLinkLoader
    channels: Mapping[str, Channel]
    secret_box: SecretBox
    # Two requests of one impatient visitor must not create two subscriptions.
    sign_up_locks: WeakValueDictionary[tuple[int, str], asyncio.Lock] = field(default_factory=WeakValueDictionary)
