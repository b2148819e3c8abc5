import pytest

from opsentry.domain.decider import InvalidField
from opsentry.identity.scopes import SCOPES, check_scopes


def test_scopes_are_ordered_and_unique():
    assert check_scopes(["write:services", "read:status", "write:services"]) == ["read:status", "write:services"]
    assert check_scopes(reversed(SCOPES)) == list(SCOPES)


@pytest.mark.parametrize("scopes", [[], ["admin"], ["read:status", "write:everything"]])
def test_invalid_scopes_are_refused_and_the_valid_ones_named(scopes):
    with pytest.raises(InvalidField, match=r"^scopes: must be one or more of read:status, .*write:subscriptions$"):
        check_scopes(scopes)
