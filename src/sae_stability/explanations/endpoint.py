"""Which endpoints may be sent a key, and which key: a study file may come from someone else."""

from urllib.parse import urlsplit

from sae_stability.errors import UserError

KEY_SUFFIX = "_API_KEY"
LOCAL = ("localhost", "127.0.0.1", "::1")


def check_endpoint(base_url: str, key: str) -> None:
    """Raise `UserError` where a study would send what is no API key, or send it where others can read it.

    The environment variable `key` ends in `_API_KEY`; `base_url` is https, or http on this machine.
    """
    if not key.endswith(KEY_SUFFIX):
        raise UserError(f"explainer.key: {key} need not hold a key; name an environment variable that ends in {KEY_SUFFIX}")
    try:
        parts = urlsplit(base_url)
        host = parts.hostname
    except ValueError:  # brackets that do not close
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise UserError(
            f"explainer.base_url: {base_url} is no address; give one such as https://HOST/v1 or http://localhost:8000/v1"
        )
    if parts.scheme == "http" and host not in LOCAL:
        raise UserError(f"explainer.base_url: {base_url} would send the key unencrypted; give an https address, or localhost")
