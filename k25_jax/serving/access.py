"""Who may ask the server: those with its key; without one, only this machine."""

import hashlib
import hmac
import ipaddress
import urllib.parse
from collections.abc import Mapping

from k25_jax.serving.errors import ApiError


class Access:
    """Checks requests. The key itself is not kept."""

    def __init__(self, key: str):
        self._key = _digest(key) if key else None

    def check(self, headers: Mapping[str, str], host: str) -> None:
        """Raise ApiError for a request without the key.

        Without a key the `Host` that was asked for must be a name of this machine: else a web page whose name was made to
        point here could ask, through the browser of whoever reads it.
        """
        if self._key is not None:
            scheme, _, given = headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
                problem = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
                raise ApiError(problem, code="invalid_api_key", status=401)
        elif not is_loopback(_name(host)):
            raise ApiError("without an API key only localhost is served", code="wrong_host", status=403)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _name(host: str) -> str:
    """The name in NAME:PORT."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
