"""Chat completions of a server that speaks OpenAI's protocol, with patience."""

import json
import re
import time
from contextlib import suppress
from http.client import HTTPException
from ipaddress import ip_address
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from plumbing.script import printable

LONGEST_WAIT = 60  # seconds, whatever a server's Retry-After says
REFUSALS = (400, 403, 413, 422)  # HTTP: it is this request that the server does not answer

# Fields that not every server takes, and how servers say so
OPTIONAL = ("seed", "top_p", "temperature", "max_tokens")
UNSUPPORTED = re.compile(
    r"unsupported|(not|n't) support|not (permitted|allowed|recognized)|unknown|unrecognized"
    r"|unexpected|extra|cannot both|max_completion_tokens",
    re.IGNORECASE,
)


class Refused(ValueError):
    """The server does not answer this request; it may well answer others."""


class Failure(Exception):
    """One request that failed: why, with which HTTP status, and when it may work."""

    def __init__(self, problem, status=None, retry_after=None):
        super().__init__(problem)
        self.problem = problem
        self.status = status  # None where no reply came, or not a chat completion
        self.retry_after = retry_after  # seconds

    def is_temporary(self):
        """Whether the same request may work later. A wrong model name, for instance, will not."""
        return self.status is None or self.status == 429 or self.status >= 500


class Server:
    """A server, and what it turned out not to take."""

    def __init__(self, endpoint, key="", timeout=120, retries=5):
        self.endpoint = endpoint
        self.key = key
        self.timeout = timeout
        self.retries = retries
        self.opener = build_opener()
        if is_this_machine(endpoint):  # which a proxy of the environment does not know
            self.opener = build_opener(ProxyHandler({}))
        self.renamed = {}  # a field -> what this server takes instead, "" where it takes nothing

    def complete(self, body):
        """A chat completion as (its text, whether the bound on its tokens ended it).

        body is what the protocol asks for: {"model": ..., "messages": [...], "temperature": ...}.
        What is temporary is tried again after 1, 2, 4, ... seconds: HTTP 429 and 5xx, a connection
        that fails or is slow, a reply that is not a chat completion. A field that the server names
        as unsupported is left out, and max_tokens sent as max_completion_tokens; where that helps,
        it is done from then on.

        ValueError says in one sentence what the last failure was, and is Refused where other
        requests may fare better. The key is not shown, neither there nor in the text, and it is not
        sent to where a server redirects.
        """
        renamed = dict(self.renamed)
        while True:
            try:
                text, cut_off = self._try(rename(body, renamed))
            except Failure as failure:
                change = renaming(failure, body.keys() - renamed.keys())
                if not change:
                    raise self._error(failure, body["model"]) from None
                renamed.update(change)
            else:
                self.renamed.update(renamed)
                return hide(self.key, text), cut_off

    def changed_fields(self):
        """A sentence for each field that this server turned out not to take."""
        sentences = []
        for field, name in self.renamed.items():
            instead = f"sent as {name}" if name else "left out"
            sentences.append(f"the server does not take {field}: {instead}")
        return sentences

    def _try(self, body):
        """One completion; temporary failures are tried again. Raises the last Failure."""
        request = build_request(f"{self.endpoint.rstrip('/')}/chat/completions", body, self.key)
        for attempt in range(self.retries + 1):
            try:
                return send(self.opener, request, self.timeout)
            except Failure as failure:
                if not failure.is_temporary() or attempt == self.retries:
                    raise
                wait = 2**attempt
                if failure.retry_after is not None:
                    wait = min(failure.retry_after, LONGEST_WAIT)
            time.sleep(wait)

    def _error(self, failure, model):
        """The ValueError that says a failure in one sentence."""
        problem = " ".join(hide(self.key, failure.problem).split())
        if failure.status == 404 and "/v1" not in self.endpoint:
            problem += "; /v1 is usually part of the address"
        kind = Refused if failure.status in REFUSALS else ValueError
        return kind(printable(f"{self.endpoint}, model {model}: {problem}"))


def is_this_machine(endpoint):
    """Whether an address is one of this machine's own: localhost, 127.0.0.1, ::1, 0.0.0.0."""
    host = urlsplit(endpoint).hostname
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


# --- fields that a server does not take -----------------------------------------------------------
def renaming(failure, fields):
    """{field: what to send it as, or ""} where the server says that it does not take the field."""
    if failure.status not in REFUSALS or not UNSUPPORTED.search(failure.problem):
        return {}
    for field in OPTIONAL:
        if field in fields and re.search(rf"\b{field}\b", failure.problem):
            if field == "max_tokens" and "max_completion_tokens" in failure.problem:
                return {field: "max_completion_tokens"}
            return {field: ""}
    return {}


def rename(body, renamed):
    """The body with the names that the server takes, without what it does not."""
    changed = {}
    for field, value in body.items():
        name = renamed.get(field, field)
        if name:
            changed[name] = value
    return changed


# --- one request ----------------------------------------------------------------------------------
def build_request(address, body, key):
    """The request that posts body as JSON, with the key if there is one."""
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key:  # urllib copies ordinary headers to where it is redirected, which may be another host
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    return request


def send(opener, request, timeout):
    """Sends a request once and returns the completion. Failure says what went wrong."""
    try:
        with opener.open(request, timeout=timeout) as reply:
            content = reply.read()
    except HTTPError as error:
        raise http_failure(error) from None
    except (OSError, HTTPException) as error:
        reason = str(getattr(error, "reason", error))
        raise Failure(reason or type(error).__name__) from None

    try:
        return completion(content)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        beginning = content[:300].decode(errors="replace") or "(nothing)"
        raise Failure(f"no chat completion in the reply: {beginning}") from None


def completion(content):
    """The bytes of a reply -> (the text of its first choice, whether a bound ended it).

    The text is empty where there is none: the thinking of a model can use up the bound.
    """
    choice = json.loads(content)["choices"][0]
    said = choice["message"].get("content") or ""
    cut_off = choice.get("finish_reason") == "length"
    if isinstance(said, str):
        return said, cut_off

    # A list of parts, of which some may be thoughts
    texts = [part["text"] for part in said if part["type"] == "text"]
    return "".join(texts), cut_off


def http_failure(error):
    """The Failure that an HTTPError is, with the beginning of what the server says about it."""
    problem = f"HTTP {error.code} "
    with suppress(OSError, HTTPException):
        problem += error.read(500).decode(errors="replace")

    retry_after = error.headers.get("Retry-After", "")
    if not retry_after.isdecimal():  # missing, or a date
        return Failure(problem, error.code)
    return Failure(problem, error.code, int(retry_after))


def hide(key, text):
    """The text without the key, which some servers repeat."""
    return text.replace(key, "[key]") if key else text
