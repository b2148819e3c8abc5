import base64

from opsentry.notifications.messages.signing import new_secret


def test_new_secrets_have_32_bytes_and_differ():
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32 for secret in secrets)
