"""One message to one address; nothing that is said about it holds a part of the address."""
from __future__ import annotations

import http.client
import urllib.error
import urllib.request


class _StayThere(urllib.request.HTTPRedirectHandler):
    """What is told to another address is told without its content: a redirect is a failure, with its number."""

    def redirect_request(self, *_args: object) -> None:
        return None


def post(kind: str, url: str, content: bytes, limit_s: float) -> str:
    """-> why it could not be told; empty: it was. Raises TimeoutError."""
    if not url.startswith(("https://", "http://")):
        return f"{kind}: what the secret holds is no http(s) address"
    try:
        request = urllib.request.Request(url, content, {"Content-Type": "application/json", "User-Agent": "launch"})
        with urllib.request.build_opener(_StayThere).open(request, timeout=limit_s) as answer:
            answer.read(1 << 10)
        return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"{kind}: HTTP {error.code} {http.client.responses.get(error.code, '')}".rstrip()
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from None
        return f"{kind}: {error.reason}"
    except TimeoutError:
        raise
    except (http.client.InvalidURL, ValueError) as error:  # their words hold parts of it
        return f"{kind}: what the secret holds is no address that can be asked ({type(error).__name__})"
    except (OSError, http.client.HTTPException) as error:
        return f"{kind}: {type(error).__name__}: {error}"
