"""The channels: each module here is one, and is found by being here.

A module has `make(parts: Dependencies) -> Channel`. Nothing else has to be changed to add one.
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
    """What channels are made of.

    Attributes:
        settings: All settings.
        http: A session that connects to nothing that must not be dialled, follows no redirects and knows no proxies.
    """

    settings: Settings
    http: aiohttp.ClientSession


def channels(parts: Dependencies) -> Mapping[str, Channel]:
    """Return a channel of each kind there is, by name."""
    made = [importlib.import_module(f"{__name__}.{found.name}").make(parts) for found in pkgutil.iter_modules(__path__)]
    return {channel.name: channel for channel in made}
