"""Who may read the dashboard, and who may stop a search.

On a loopback address any process of this machine may read, under the names of that address alone, so that a
page of another site cannot read it by a name that leads here. Elsewhere, and to stop a search anywhere, the
token is needed: once in the address, then as a cookie.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")
_WEEK = 7 * 24 * 3600

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Headers of every answer."""


def new_token() -> str:
    """A token that nobody guesses.

    Returns:
        24 characters that may stand in an address.
    """
    return secrets.token_urlsafe(18)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone.

    Args:
        host: A name or an IP address.

    Returns:
        True for localhost and addresses such as 127.0.0.1.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Access:
    """The rules of one server.

    Attributes:
        token: What lets in, and stops a search.
        is_local: Whether the server listens on a loopback address.
    """

    token: str
    is_local: bool

    def may_read(self, request: Request) -> bool:
        """Whether a request may see the studies.

        Args:
            request: The request.

        Returns:
            True on a loopback address under its own names, or with the token.
        """
        named = (request.url.hostname or "").lower() in _LOCAL_NAMES
        return (self.is_local and named) or self.has_token(request)

    def has_token(self, request: Request) -> bool:
        """Whether a request comes with the cookie that the token gives.

        Args:
            request: The request.

        Returns:
            True where it does.
        """
        return hmac.compare_digest(request.cookies.get(self._cookie, "").encode(), self._session.encode())

    @property
    def stop_key(self) -> str:
        """What the form that stops a search has to send beside the cookie."""
        return self._derived("stop")

    def may_stop(self, request: Request, key: str) -> bool:
        """Whether a request may stop a search.

        Args:
            request: The request.
            key: What its form has sent.

        Returns:
            True with the token's cookie and the key of the page that the cookie gave.
        """
        return self.has_token(request) and hmac.compare_digest(key.encode(), self.stop_key.encode())

    def let_in(self, request: Request) -> Response | None:
        """Turns a token in an address into a cookie.

        Args:
            request: The request.

        Returns:
            The way to the same page without the token; None where the address has none, or a wrong one.
        """
        given = request.query_params.get("token", "")
        if request.method != "GET" or not hmac.compare_digest(given.encode(), self.token.encode()):
            return None
        rest = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
        response = RedirectResponse(f"./?{urlencode(rest)}" if rest else "./", status_code=303)
        # no path: a browser takes the folder of the address it knows, behind a proxy's prefix too
        response.set_cookie(
            self._cookie,
            self._session,
            max_age=_WEEK,
            path=None,
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="lax",
        )
        return response

    @property
    def _cookie(self) -> str:
        return f"evomerge-{self._derived('name')[:8]}"

    @property
    def _session(self) -> str:
        return self._derived("session")

    def _derived(self, purpose: str) -> str:
        return hmac.new(self.token.encode(), purpose.encode(), hashlib.sha256).hexdigest()
