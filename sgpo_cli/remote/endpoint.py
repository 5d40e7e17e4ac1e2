"""Where requests go: an address that was checked, and what of it may be shown."""

import ipaddress
import logging
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from sgpo_cli.errors import UsageError
from sgpo_cli.remote.secret import Secret, redact

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """A server. `url` has neither credentials nor a query, so it can be shown and recorded."""

    url: str
    key: Secret | None = None
    query: dict[str, str] = field(default_factory=dict, repr=False)


def clean_url(url: str) -> str:
    """The address without user, password, query and trailing slash: what tells one endpoint from another.

    Raises:
        UsageError: not an http or https address.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"base URL {redact(url)!r}: {error}", "for example http://localhost:8000/v1") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(
            f"base URL {redact(url)!r}: expected http:// or https:// and a host",
            "for example http://localhost:8000/v1",
        )
    shown = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, f"{shown}:{port}" if port else shown, parts.path.rstrip("/"), "", ""))


def open_endpoint(url: str, key: Secret | None, *, allow_insecure: bool = False) -> Endpoint:
    """The endpoint at `url`.

    Raises:
        UsageError: an address that no request should go to, or a key that would travel in the clear.
    """
    clean = clean_url(url)
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    for value in (parts.password, *query.values()):
        if value:
            Secret(value)
    if parts.username or parts.password:
        logger.warning("%s: user and password in the URL are not sent; give the key in the environment", clean)
    host = parts.hostname or ""
    if _is(host, "is_link_local"):
        raise UsageError(f"{clean}: a link-local address, where no model is served", "name the server's address")
    if key is not None and parts.scheme == "http" and not allow_insecure and not _local(host):
        raise UsageError(
            f"{clean}: the API key would travel unencrypted",
            "use https; for a server without a key set its --*-api-key-env to ''; or pass --allow-insecure",
        )
    return Endpoint(clean, key, query)


def _local(host: str) -> bool:
    return host == "localhost" or host.endswith(".localhost") or _is(host, "is_loopback")


def _is(host: str, kind: str) -> bool:
    try:
        return bool(getattr(ipaddress.ip_address(host.partition("%")[0]), kind))
    except ValueError:
        return False
