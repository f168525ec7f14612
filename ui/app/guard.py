"""Which requests reach the page: those from this page, with a bounded amount of uploads.

The page has no login on this machine, so a website that the reader visits must not use it: by a
host name that it points here (DNS rebinding), or by a form that it posts here. Uploads are files
on disk before any event runs; their sum is bounded.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
UPLOAD_QUOTA = 100_000_000  # bytes of one running app


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def middleware(host: str, folder: Path | None) -> list[Middleware]:
    """What stands before the page that listens at `host` and stores uploads in `folder`."""
    checks = [Middleware(SameOrigin), Middleware(UploadQuota, folder=folder)]
    if not is_loopback(host):  # reached under names that only its network knows; it has a login
        return checks
    names = {*LOOPBACK_NAMES, f"[{host}]" if ":" in host else host}
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=sorted(names), www_redirect=False),
        *checks,
    ]


class SameOrigin:
    """Refuses a request that another site's page sent; a script sends no Origin and passes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 403."""
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != headers.get("host"):
                await PlainTextResponse("Not from this page.", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class UploadQuota:
    """Refuses uploads once the files in `folder`, with this one, exceed `UPLOAD_QUOTA` bytes."""

    def __init__(self, app: ASGIApp, folder: Path | None) -> None:
        self.app, self.folder = app, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 413."""
        is_upload = (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and scope["path"].rstrip("/").endswith("/upload")
        )
        if self.folder is None or not is_upload:
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        stored = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        # A body of unknown length cannot be bounded before it is on disk.
        if not length.isdecimal() or stored + int(length) > UPLOAD_QUOTA:
            text = "Too many uploads: restart the app to delete them."
            await PlainTextResponse(text, 413)(scope, receive, send)
            return
        await self.app(scope, receive, send)
