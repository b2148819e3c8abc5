"""Define who may see an incident, a maintenance window or a service: the public, or the tenant alone."""

from typing import Literal, TypeAlias, get_args

Visibility: TypeAlias = Literal["public", "internal"]
VISIBILITIES: tuple[Visibility, ...] = get_args(Visibility)
