"""What may be said of a URL or of a value from the environment: never a user name, a password or a query.

Everything that batchmix writes, logs or reports passes through here. What identifies data is its bytes
(`Source.fingerprint`), so credentials that were renewed change nothing; a fingerprint of the hidden text is kept beside
it for people who compare two runs.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import threading
import traceback
from types import TracebackType
from urllib.parse import quote, quote_plus, unquote, unquote_plus

HIDDEN = "***"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_NEXT_OF_CHAIN = re.compile(rf"::(?={_SCHEME.pattern})")  # fsspec's: zip://*.csv::https://host/all.zip
_IN_TEXT = re.compile(rf"{_SCHEME.pattern}\S*")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")  # of the Hugging Face hub
_WEB = {"http", "https"}  # elsewhere `?` and `#` can be a pattern's or a key's own, unless a name and `=` follow
_CONTAINERS = {"abfs", "abfss", "adl", "wasb", "wasbs"}  # CONTAINER@ACCOUNT, which is no secret
_WITH_PORT = {"http", "https", "ftp", "sftp", "ssh", "hdfs", "webhdfs", "smb", "tcp", "ray"}
_SHORTEST = 6  # characters of a secret that is looked for outside of URLs; fewer would be found in ordinary words

_known: dict[str, str] = {}  # secret -> what stands in its place


class FromEnvironment(str):
    """A text that the configuration took from environment variables. `written` is how: `${oc.env:DATA}/rows.jsonl`."""

    __slots__ = ("written",)
    written: str

    def __new__(cls, value: str, written: str) -> FromEnvironment:
        text = super().__new__(cls, value)
        text.written = written
        return text

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.written


def redact_url(url: str) -> str:
    """A URL, or several of fsspec's joined by `::`, without user names, passwords, query and fragment; other texts as
    they are. `https://***@host/rows.jsonl?***`."""
    parts = []
    for part in _NEXT_OF_CHAIN.split(_TOKEN.sub(f"hf_{HIDDEN}", url)):
        parts.append(_redact_part(part))
        if parts[-1] != part and parts[-1].endswith(HIDDEN):
            break  # what follows a query may belong to it
    return "::".join(parts)


def redact(text: str) -> str:
    """The same of all URLs in a text, and without the secrets that were remembered."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, _known[secret])
    return _TOKEN.sub(f"hf_{HIDDEN}", _IN_TEXT.sub(_redact_found, text))


def remember_url(url: str) -> None:
    """From now on, `redact` hides the secrets of this URL also where they stand without it, as in errors of stores."""
    for part in _NEXT_OF_CHAIN.split(url):
        _, mark, rest = part.partition("://")
        if not mark or redact_url(part) == part:
            continue
        front, query = re.match(r"([^?#]*)[?#]?(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
        pairs = [query, *re.split("[?&;#]", query)]
        secrets = [*pairs, *(pair.partition("=")[2] for pair in pairs)]
        if f"://{HIDDEN}@" in redact_url(part):
            userinfo = front.rpartition("@")[0]
            secrets += [userinfo, userinfo.partition(":")[2]]
        for secret in secrets:
            for form in (secret, unquote(secret), unquote_plus(secret), quote(secret), quote_plus(secret)):
                remember(form, HIDDEN)


def name_of(url: str) -> str:
    """What messages and files call a place that the user named; `redact` hides its secrets from now on."""
    remember_url(url)
    return redact(redact_url(url))


def remember(secret: str, shown: str) -> None:
    """From now on, `redact` writes `shown` for it."""
    if len(secret) >= _SHORTEST and secret not in shown:
        _known[secret] = shown


def forget() -> None:
    """All that was remembered."""
    _known.clear()


def fingerprint(secret: str) -> str:
    """32 hex digits that tell one text from another. scrypt, since a password is guessed at where a hash is quick."""
    data = secret.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(data, salt=b"batchmix", n=1 << 14, r=8, p=1, dklen=16).hex()


def _redact_part(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    if not mark or not _SCHEME.fullmatch(scheme + mark):
        return url
    scheme = scheme.lower()
    query = re.search(r"[?#](?!$)" if scheme in _WEB else r"[?#](?=[^/?#]*=)", rest)
    front = rest if query is None else rest[: query.start()]
    after = "" if query is None else query[0] + HIDDEN
    host, slash, _ = front.partition("/")
    if not slash and query is not None and "@" in rest[query.start() :]:
        return f"{url[: len(scheme)]}://{HIDDEN}"  # a password with `?` or `#` in it, or an address in the query
    colon = re.search(r":(?!\d*$)" if scheme in _WITH_PORT else ":", re.sub(r"^\[[^\]]*\]", "", host))
    if "@" in host and not (scheme in _CONTAINERS and colon is None):
        front = f"{HIDDEN}@{front.rpartition('@')[2]}"
    elif colon is not None:  # a password with `/` in it, or with no host after it
        front = f"{HIDDEN}@{front.rpartition('@')[2]}" if "@" in front else HIDDEN
    return f"{url[: len(scheme)]}://{front}{after}"


def _redact_found(found: re.Match[str]) -> str:
    """URLs in a text, of which nobody knows where they end: at white space, or where the next one begins."""
    whole, done = found[0], ""
    starts = [match.start() for match in _SCHEME.finditer(whole)]
    for start, end in zip(starts, [*starts[1:], len(whole)], strict=True):
        piece = whole[start:end]
        url = piece.rstrip(")]}>'\",.;:")
        shown = redact_url(url)
        if shown.endswith(HIDDEN) and shown != url:
            return done + shown  # the rest may belong to the query
        done += shown + piece[len(url) :]
    return done


class RedactingFormatter(logging.Formatter):
    """Of log records, tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """From now on, those of this process's threads are printed without secrets."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    def show_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
            show(failed.exc_type, failed.exc_value, failed.exc_traceback)

    sys.excepthook, threading.excepthook = show, show_thread
