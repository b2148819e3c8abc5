import base64
import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsentry.infrastructure.encryption import EncryptionKeyMissing, generate_key
from opsentry.notifications.messages.links import CONFIRM, UNSUBSCRIBE, Links
from opsentry.notifications.messages.signing import new_secret
from opsentry.settings import Settings

OLD, NEW, FOREIGN = generate_key(), generate_key(), generate_key()
SETTINGS = Settings(encryption_keys=(OLD,), public_url="https://status.example.com/")


def test_a_new_secret_is_32_bytes_and_never_the_same():
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32 for secret in made)


@given(st.integers(1, 2**63 - 1), st.integers(1, 2**63 - 1), st.sampled_from([CONFIRM, UNSUBSCRIBE]))
def test_a_token_says_whose_it_is(tenant_id, subscription_id, purpose):
    token = Links(SETTINGS).token(purpose, tenant_id, subscription_id)
    assert set(token) <= set(string.ascii_letters + string.digits + "-_")
    assert Links(SETTINGS).read(purpose, token) == (tenant_id, subscription_id)
    assert Links(replace(SETTINGS, encryption_keys=(NEW, OLD))).read(purpose, token) == (tenant_id, subscription_id)
    other = CONFIRM if purpose == UNSUBSCRIBE else UNSUBSCRIBE
    assert Links(SETTINGS).read(other, token) is None
    assert Links(replace(SETTINGS, encryption_keys=())).read(purpose, token) is None
    assert Links(replace(SETTINGS, encryption_keys=(NEW, FOREIGN))).read(purpose, token) is None


@given(st.integers(0, 63), st.sampled_from(string.ascii_letters + string.digits + "-_=+/%\u00e9 \n"))
def test_no_character_of_a_token_may_be_another(place, character):
    token = Links(SETTINGS).token(CONFIRM, 7, 8)
    changed = token[:place] + character + token[place + 1 :]
    assert (Links(SETTINGS).read(CONFIRM, changed) is None) == (changed != token)


@given(st.text(max_size=80))
def test_nonsense_is_no_token(text):
    assert Links(SETTINGS).read(CONFIRM, text) is None


def test_links_lead_to_the_public_address():
    links = Links(SETTINGS)
    assert links.url(CONFIRM, 1, 2) == "https://status.example.com/confirm/" + links.token(CONFIRM, 1, 2)
    with pytest.raises(EncryptionKeyMissing):
        Links(Settings()).url(CONFIRM, 1, 2)
