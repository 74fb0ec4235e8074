"""The formats of JSON Schema as regular expressions, each narrow enough for every validator's reading of it.

https://json-schema.org/draft/2020-12/json-schema-validation#section-7. Names that no draft has are annotations.
"""

from __future__ import annotations

_LEAP = r"(\d\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_YEAR = r"(000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d{3})"
_DAY = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    rf"|{_LEAP}-02-29)"
)
_TIME = r"(([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d))"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"{_BYTE}(\.{_BYTE}){{3}}"
_GROUP = r"[0-9A-Fa-f]{1,4}"
_IPV6 = "|".join([
    rf"({_GROUP}:){{7}}{_GROUP}",
    *(rf"({_GROUP}(:{_GROUP}){{0,{before}}})?::({_GROUP}(:{_GROUP}){{0,{5 - before}}})?" for before in range(6)),
    rf"{_GROUP}(:{_GROUP}){{6}}::",
    rf"({_GROUP}:){{6}}{_IPV4}", rf"::(ffff:)?{_IPV4}",
])  # fmt: skip
_LABEL = "[A-Za-z0-9]+(-[A-Za-z0-9]+)*"
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_EMAIL = rf"{_ATOM}(\.{_ATOM})*@{_LABEL}(\.{_LABEL})+"


def _addresses(more: str) -> tuple[str, str]:
    """URIs, and references to them, in which the characters `more` may stand too (RFC 3986 and RFC 3987)."""
    plain = rf"[A-Za-z0-9._~!$&'()*+,;={more}-]|%[0-9A-Fa-f]{{2}}"
    pchar = rf"({plain}|[:@])"
    tail = rf"(\?({pchar}|[/?])*)?(#({pchar}|[/?])*)?"
    authority = rf"//(({plain}|:)*@)?({plain})*(:\d*)?(/{pchar}*)*"
    path = rf"(/({pchar}+(/{pchar}*)*)?|{pchar}+(/{pchar}*)*)"
    relative = rf"(({plain}|@)+(/{pchar}*)*|/({pchar}+(/{pchar}*)*)?)"  # no colon in the first part
    whole = rf"[A-Za-z][A-Za-z0-9+.-]*:({authority}|{path})"
    return f"{whole}{tail}", f"({whole}|{authority}|{relative}|){tail}"


_URI, _URI_REFERENCE = _addresses("")
_IRI, _IRI_REFERENCE = _addresses(r"\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef")
_IN_TEMPLATE = r"([A-Za-z0-9._~!$&()*+,;=:@/?#-]|%[0-9A-Fa-f]{2})"
_SECONDS = r"(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S)"
_DAYS = r"(\d+Y(\d+M(\d+D)?)?|\d+M(\d+D)?|\d+D)"


def _regexes() -> str:
    """Regexes that ECMA-262 and Python's `re` both read: characters, classes, anchors, and groups in groups in groups."""
    character = r"([^\\^$.*+?()\[\]{}|/\s\x00-\x1f]|\\[dDwWsSnrtfv^$.*+?()\[\]{}|/\\]|\.)"
    member = r"([^\\\[\]^&~|\s\x00-\x1f-]|\\[dDwWsSnrt.\[\]\\^-]|a-z|A-Z|0-9)"
    atom = rf"({character}|\[\^?{member}+\])"
    one = rf"({atom}|{atom}([*+?]|\{{\d{{1,3}},?\}})\??|\^|\$)"
    found = rf"{one}*(\|{one}*)*"
    for _ in range(2):
        group = rf"\((\?:)?{found}\)([*+?]|\{{\d{{1,3}},?\}})?"
        found = rf"({one}|{group})*(\|({one}|{group})*)*"
    return found


_POINTER = "(/([^/~]|~[01])*)*"
FORMATS = {
    "date": _DAY,
    "time": _TIME,
    "date-time": f"{_DAY}T{_TIME}",
    "duration": rf"P({_DAYS}(T{_SECONDS})?|T{_SECONDS}|\d+W)",
    "uuid": "[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}",
    "ipv4": _IPV4,
    "ip-address": _IPV4,  # draft 3's name
    "ipv6": _IPV6,
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": rf"(?=.{{1,63}}$)[A-Za-z]([A-Za-z0-9]|-[A-Za-z0-9])*(\.{_LABEL})*",
    "idn-hostname": rf"(?=.{{1,63}}$)[a-z]([a-z0-9]|-[a-z0-9])*(\.{_LABEL})*",
    "uri": _URI,
    "iri": _IRI,
    "uri-reference": _URI_REFERENCE,
    "iri-reference": _IRI_REFERENCE,
    "uri-template": rf"({_IN_TEMPLATE}|\{{[A-Za-z0-9_]+(,[A-Za-z0-9_]+)*\}})*",
    "regex": _regexes(),
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(0|[1-9]\d*)(#|{_POINTER})",
}
