"""Read and check the sign-up form."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import parse_qs

from opsentry.domain.decider import InvalidField
from opsentry.domain.incident import SEVERITIES
from opsentry.domain.subscription import CreateSubscription
from opsentry.notifications.channel import BadTarget, Channel
from opsentry.projections.services import ServiceLink

EMAIL = "email"
MAX_SERVICES = 500

_ALL_SERVICES, _SELECTED_SERVICES = "all", "selected"


class SignUpForm(NamedTuple):
    """The fields of the form as the visitor sent them, valid or not.

    Attributes:
        email: The address.
        services: `all` or `selected`.
        service_ids: The checked services; ignored with `all`.
        min_severity: The lowest severity of the incidents that the visitor wants to hear about.
    """

    email: str = ""
    services: str = _ALL_SERVICES
    service_ids: Sequence[str] = ()
    min_severity: str = SEVERITIES[0]

    @classmethod
    def parse(cls, body: bytes) -> "SignUpForm":
        """Return the form in a body of type `application/x-www-form-urlencoded`.

        Raises:
            InvalidField: The body is not such a form, or has too many fields.
        """
        try:
            fields = parse_qs(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=2 * MAX_SERVICES)
        except ValueError:
            raise InvalidField("body", "not a form") from None
        first = {name: values[0] for name, values in fields.items()}
        return cls(
            email=first.get("email", "").strip(),
            services=first.get("services", _ALL_SERVICES),
            service_ids=fields.get("service_id", ()),
            min_severity=first.get("min_severity", SEVERITIES[0]),
        )

    def validate(self, channel: Channel, offered: Sequence[ServiceLink]) -> Mapping[str, str]:
        """Return a message for each field that has an error.

        Args:
            channel: The channel `email`, which knows valid addresses.
            offered: The services on the page. Every other service is unknown to the visitor.
        """
        problems = {}
        if not self.email:
            problems["email"] = "Enter your email address"
        else:
            try:
                channel.validate_target(self.email)
            except BadTarget as error:
                problems["email"] = f"Your email address {error}"
        offered_ids = {str(service.id) for service in offered}
        is_selection = self.services == _SELECTED_SERVICES and bool(self.service_ids)
        if self.services != _ALL_SERVICES and not (is_selection and offered_ids.issuperset(self.service_ids)):
            problems["services"] = "Select at least one service, or select all services"
        if self.min_severity not in SEVERITIES:
            problems["min_severity"] = "Select which incidents you want to hear about"
        return problems

    def command(self, channel: Channel) -> CreateSubscription:
        """Return the command for a form that `validate` accepts: a subscription that awaits confirmation."""
        selected = self.service_ids if self.services == _SELECTED_SERVICES else ()
        return CreateSubscription(
            channel=EMAIL,
            target=channel.validate_target(self.email),
            audience="public",
            service_ids=tuple(int(service_id) for service_id in selected),
            min_severity=self.min_severity,
            pending=True,
        )
