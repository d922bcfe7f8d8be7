"""One chat completion of a server that speaks OpenAI's protocol, with patience."""

import json
import time
from contextlib import suppress
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from plumbing.script import printable

LONGEST_WAIT = 60  # seconds, whatever a server's Retry-After says


def complete(endpoint, body, key="", timeout=120, retries=5):
    """The text of a server's chat completion.

    body is what the protocol asks for: {"model": ..., "messages": [...], "temperature": ...}.
    What is temporary is tried again after 1, 2, 4, ... seconds: HTTP 429 and 5xx, a connection
    that fails or is slow, a reply that is not a chat completion.

    ValueError says in one sentence what the last failure was. The key is not shown, neither there
    nor in the text, and it is not sent to where a server redirects.
    """
    request = build_request(f"{endpoint.rstrip('/')}/chat/completions", body, key)

    for attempt in range(retries + 1):
        try:
            return hide(key, send(request, timeout))
        except Failure as failure:
            problem = failure.problem
            if not failure.is_temporary:
                break
            wait = 2**attempt
            if failure.retry_after is not None:
                wait = min(failure.retry_after, LONGEST_WAIT)

        if attempt < retries:
            time.sleep(wait)

    problem = " ".join(hide(key, problem).split())
    raise ValueError(printable(f"{endpoint}, model {body['model']}: {problem}"))


class Failure(Exception):
    """One request that failed: why, whether it may work later, and when the server says so."""

    def __init__(self, problem, is_temporary=True, retry_after=None):
        super().__init__(problem)
        self.problem = problem
        self.is_temporary = is_temporary
        self.retry_after = retry_after  # seconds


def build_request(address, body, key):
    """The request that posts body as JSON, with the key if there is one."""
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key:  # urllib copies ordinary headers to where it is redirected, which may be another host
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    return request


def send(request, timeout):
    """Sends a request once and returns the completion's text. Failure says what went wrong."""
    try:
        with urlopen(request, timeout=timeout) as reply:
            return completion_text(reply.read())

    except HTTPError as error:
        raise http_failure(error) from None
    except (OSError, HTTPException) as error:
        reason = str(getattr(error, "reason", error))
        raise Failure(reason or type(error).__name__) from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise Failure("no chat completion in the reply") from None


def completion_text(reply):
    """The bytes of a reply -> the text of its first choice, which may be empty or null."""
    text = json.loads(reply)["choices"][0]["message"]["content"] or ""
    if not isinstance(text, str):
        raise TypeError("content is not text")
    return text


def http_failure(error):
    """The Failure that an HTTPError is, with the beginning of what the server says about it."""
    problem = f"HTTP {error.code} "
    with suppress(OSError, HTTPException):
        problem += error.read(500).decode(errors="replace")

    is_temporary = error.code == 429 or error.code >= 500  # a wrong model name is not, for instance
    retry_after = error.headers.get("Retry-After", "")
    if not retry_after.isdecimal():  # missing, or a date
        return Failure(problem, is_temporary)
    return Failure(problem, is_temporary, int(retry_after))


def hide(key, text):
    """The text without the key, which some servers repeat."""
    return text.replace(key, "[key]") if key else text
