"""Sending: messages a second of one sender, and what bad endpoints cost the others."""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from typing import Any

import aiohttp
import uvloop

from bench.figure import Figure
from bench.servers import Servers, environment, process, running
from opsentry.access import tenants
from opsentry.config import Settings
from opsentry.domain import incident, subscription
from opsentry.domain.incident import OpenIncident
from opsentry.domain.subscription import CreateSubscription
from opsentry.events.codec import Actor, Meta
from opsentry.notifications.sealing import Sealing, new_key, new_signing_secret
from opsentry.wiring import Core, core

META = Meta(Actor("operator"))
ENDPOINTS, INCIDENTS = 50, 200
AT_ONCE = 64
BAD = 20
