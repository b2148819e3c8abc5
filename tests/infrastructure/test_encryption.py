import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsentry.infrastructure.encryption import DecryptionFailed, EncryptionKeyMissing, SecretBox, generate_key
from opsentry.settings import Settings

OLD, NEW, FOREIGN = generate_key(), generate_key(), generate_key()


@given(st.text())
def test_any_key_decrypts_and_the_first_one_encrypts(text):
    encrypted = SecretBox([OLD]).encrypt(text)
    assert SecretBox([OLD]).decrypt(encrypted) == SecretBox([NEW, OLD]).decrypt(encrypted) == text
    with pytest.raises(DecryptionFailed):
        SecretBox([OLD]).decrypt(SecretBox([NEW, OLD]).encrypt(text))


def test_equal_texts_are_encrypted_differently():
    box = SecretBox([OLD])
    assert box.encrypt("hunter2") != box.encrypt("hunter2")


@pytest.mark.parametrize("keys", [[], [FOREIGN]])
@pytest.mark.parametrize(
    "encrypted", [SecretBox([OLD]).encrypt("hunter2"), "hunter2", "", "gAAAAA\u00e9", "[redacted]"]
)
def test_a_failed_decryption_names_the_setting_and_no_secret(keys, encrypted):
    with pytest.raises(DecryptionFailed, match="OPSENTRY_ENCRYPTION_KEYS") as caught:
        SecretBox(keys).decrypt(encrypted)
    assert "hunter2" not in str(caught.value)
    assert not any(key in str(caught.value) for key in keys)


def test_encryption_without_a_key_names_the_setting_and_the_command():
    with pytest.raises(EncryptionKeyMissing, match=r"OPSENTRY_ENCRYPTION_KEYS.*opsentry keys generate"):
        SecretBox([]).encrypt("hunter2")


def test_the_settings_accept_a_generated_key():
    key = generate_key()
    assert Settings.from_environment({"OPSENTRY_ENCRYPTION_KEYS": f"{key},{generate_key()}"}).encryption_keys[0] == key
