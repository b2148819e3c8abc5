"""The parts that use cases work with."""

from collections.abc import Mapping
from dataclasses import dataclass

from opsentry.events.appender import Appender
from opsentry.events.new_command_handler import CommandHandler
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
