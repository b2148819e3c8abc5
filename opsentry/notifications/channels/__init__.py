"""Find the channels: each module of this package is one.

To add a channel, add a module with a function `make(parts: Dependencies) -> Channel`. Nothing else changes.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from opsentry.notifications.channel import Channel
from opsentry.settings import Settings


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Everything that a channel may need.

    Attributes:
        settings: All settings.
        http: A session behind the egress filter. It follows no redirects and uses no proxies.
    """

    settings: Settings
    http: aiohttp.ClientSession


def channels(parts: Dependencies) -> Mapping[str, Channel]:
    """Return one channel of each kind, by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    made: list[Channel] = [module.make(parts) for module in modules]
    return {channel.name: channel for channel in made}
