import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsentry.infrastructure.encryption import EncryptionKeyMissing, generate_key
from opsentry.notifications.messages.links import CONFIRM, UNSUBSCRIBE, SignedLinks
from opsentry.settings import Settings

OLD, NEW, FOREIGN = generate_key(), generate_key(), generate_key()
SETTINGS = Settings(encryption_keys=(OLD,), public_url="https://status.example.com/")


@given(st.integers(1, 2**63 - 1), st.integers(1, 2**63 - 1), st.sampled_from([CONFIRM, UNSUBSCRIBE]))
def test_a_token_names_its_subscription_for_one_purpose(tenant_id, subscription_id, purpose):
    token = SignedLinks(SETTINGS).token(purpose, tenant_id, subscription_id)
    ids = (tenant_id, subscription_id)
    assert set(token) <= set(string.ascii_letters + string.digits + "-_")
    assert SignedLinks(SETTINGS).verify(purpose, token) == ids
    assert SignedLinks(replace(SETTINGS, encryption_keys=(NEW, OLD))).verify(purpose, token) == ids
    other = CONFIRM if purpose == UNSUBSCRIBE else UNSUBSCRIBE
    assert SignedLinks(SETTINGS).verify(other, token) is None
    assert SignedLinks(replace(SETTINGS, encryption_keys=())).verify(purpose, token) is None
    assert SignedLinks(replace(SETTINGS, encryption_keys=(NEW, FOREIGN))).verify(purpose, token) is None


def test_equal_subscription_ids_of_two_tenants_have_different_tokens():
    links = SignedLinks(SETTINGS)
    acme, globex = (links.token(UNSUBSCRIBE, tenant_id, 1) for tenant_id in (1, 2))
    assert acme != globex
    assert links.verify(UNSUBSCRIBE, acme) == (1, 1)
    assert links.verify(UNSUBSCRIBE, globex) == (2, 1)
    # The ids take the first 16 bytes. One tenant's ids under the other's signature are not valid.
    assert links.verify(UNSUBSCRIBE, acme[:20] + globex[20:]) is None
    assert links.verify(UNSUBSCRIBE, globex[:20] + acme[20:]) is None


@given(st.integers(0, 63), st.sampled_from(string.ascii_letters + string.digits + "-_=+/%\u00e9 \n"))
def test_a_token_with_one_changed_character_is_invalid(index, character):
    token = SignedLinks(SETTINGS).token(CONFIRM, 7, 8)
    changed = token[:index] + character + token[index + 1 :]
    assert (SignedLinks(SETTINGS).verify(CONFIRM, changed) is None) == (changed != token)


@given(st.text(max_size=80))
def test_random_text_is_no_token(text):
    assert SignedLinks(SETTINGS).verify(CONFIRM, text) is None


def test_links_begin_with_the_public_url():
    links = SignedLinks(SETTINGS)
    assert links.url(CONFIRM, 1, 2) == "https://status.example.com/confirm/" + links.token(CONFIRM, 1, 2)
    with pytest.raises(EncryptionKeyMissing):
        SignedLinks(Settings()).url(CONFIRM, 1, 2)
