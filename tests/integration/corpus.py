"""Requests, byte for byte: odd ones by hand, and two hundred by chance, always the same."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from urllib.parse import quote, urlencode

GENERATED = 200
SEED = 20261122


@dataclass(frozen=True)
class Request:
    """What a client sends on a connection of its own.

    :param late: the head is right, and what a parser may object to comes after it: the
        application may have been called by then, as it is by gunicorn.
    :param broken: there is no whole body, and nobody may take it for one.
    :param ends: the client says no more, where a server would wait for more.
    """

    name: str
    raw: bytes
    method: str = "GET"
    late: bool = False
    broken: bool = False
    ends: bool = False


Fields = Iterable[str | bytes]

HOST = "Host: example.test"


def as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


def message(line: str | bytes, fields: Fields = (HOST,), body: bytes = b"") -> bytes:
    return b"\r\n".join([as_bytes(line), *map(as_bytes, fields), b"", body])


def chunked(*parts: bytes, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    body = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
    return body + b"0" + extension + b"\r\n" + trailers + b"\r\n"


def with_length(body: bytes, *fields: str) -> tuple[list[str], bytes]:
    return [HOST, *fields, f"Content-Length: {len(body)}"], body


# --- By hand

METHOD_LINES = [
    *("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "PURGE", "PROPFIND"),
    *("get", "Get", "FOO", "M-SEARCH", "GE", "X" * 20, "X" * 21, "X" * 400),
    *("G@T", "G,T", "GET\t", "", "GÄT", "CONNECT"),
]

TARGETS: list[str | bytes] = [
    # Sane, if seldom.
    *("/", "/see/k%C3%A4se", "/see/%F0%9F%98%80", "/see/a%20b+c", "/see/%7Euser", "/see/~user"),
    *("/see/%2541", "/see/a%2Fb", "/see/a%2fb", "/see/%2E%2E/x", "/see/a;v=1/b,c", "/see/a:b@c"),
    *("/see/!$&'()*+,=", "/see?a=1&b=2&a=3", "/see?a", "/see?=1&&b=", "/see?a=%C3%A4&b=+%2B"),
    *("/see?a=b?c=d", "/see?a=/x/../y", "/see?%FF=%FE", "/see?a[]=1&a[b]=2", "/see?x=a;y=b"),
    # Paths that somebody might tidy up.
    *(
        "//see//x",
        "/see//x",
        "/see/x//",
        "/./see",
        "/see/./x",
        "/see/../see/x",
        "/../see",
        "/see/..",
    ),
    # Odd encodings.
    *("/see/%FF%FE", "/see/%C3", "/see/a%C3%28b", "/see/%EF%BF%BD", "/see/%EF%BF%BD%FF"),
    *("/see/%", "/see/%2", "/see/%zz", "/see/%u00e4", "/see/%00", "/see/%0D%0AX: y", "/see/%0d%0a"),
    *("/see/|^`{}", '/see/"<>', "/see/\\x", "/see/[x]"),
    # Empty query, fragments.
    *("/see?", "/see/?", "/see??", "/see?#", "/see#part", "/see?a=b#c?d", "/see/#"),
    # Other forms.
    *("*", "see", "", "example.test:80", "?a=b", "http://other.test/see?a=b", "http://other.test"),
    *(
        "HTTP://OTHER.test:8080/see",
        "https://other.test/see",
        "ftp://other.test/see",
        "http:///see",
    ),
    *("http://user:pass@other.test/see", "http://[::1]/see", "http://[::1/see", "//other.test/see"),
    # Bytes that do not belong there.
    *(
        b"/see/k\xc3\xa4se",
        b"/see/\xff",
        b"/see?q=\xc3\xa4",
        b"/see?q=\xff",
        b"/see/\x00",
        b"/see/\x7f",
    ),
    *("/see/a b", "/see/a\tb", " /see", "/see "),
    # Length.
    *("/see/" + "x" * 2000, "/see?" + "a=b&" * 500, "/see/" + "y" * 9000),
]

VERSIONS = [
    *("GET /see HTTP/1.0", "GET /see HTTP/0.9", "GET /see HTTP/1.2", "GET /see HTTP/2.0"),
    *(
        "GET /see HTTP/11.1",
        "GET /see HTTP/1",
        "GET /see http/1.1",
        "GET /see XTTP/1.1",
        "GET /see",
    ),
    *("GET  /see HTTP/1.1", "GET /see  HTTP/1.1", "GET /see HTTP/1.1 ", "\r\nGET /see HTTP/1.1"),
]

FIELDS: list[tuple[str, list[str | bytes]]] = [
    ("no host", []),
    ("empty host", ["Host:"]),
    ("two hosts", [HOST, "Host: other.test"]),
    ("the same host twice", [HOST, HOST]),
    ("host with port", ["Host: example.test:8080"]),
    ("host with the default port", ["Host: example.test:80"]),
    ("host in capitals", ["HOST: EXAMPLE.test"]),
    ("host of IPv6", ["Host: [::1]:8080"]),
    ("bad host", ["Host: exa mple/test"]),
    ("host of bytes", [b"Host: ex\xc3\xa4mple.test"]),
    ("folded", [HOST, "X-Folded: a\r\n b"]),
    ("folded with a tab", [HOST, "X-Folded: a\r\n\tb"]),
    ("folded first", [" X: y", HOST]),
    ("space before the colon", [HOST, "X-Space : a"]),
    ("tab before the colon", [HOST, "X-Tab\t: a"]),
    ("no colon", [HOST, "X-Nothing"]),
    ("no name", [HOST, ": value"]),
    ("odd name", [HOST, "X!#$%&'*+.^`|~: a"]),
    ("bad name", [HOST, "X(Y): a"]),
    ("name of bytes", [HOST, b"X-\xe4: a"]),
    ("empty value", [HOST, "X-Empty:", "X-Blank:   "]),
    ("spaces around", [HOST, "X-Spaces: \t a  b \t ", "X-None:a"]),
    ("underscores", [HOST, "X_Forwarded_For: evil", "X-Real_Name: evil", "X-Real-Name: good"]),
    ("underscore in the length", [HOST, "Content_Length: 5", "Content_Type: text/evil"]),
    ("latin-1", [HOST, b"X-Latin: K\xe4se", b"X-Utf8: K\xc3\xa4se", b"X-High: \x80\x85\xa0\xff"]),
    ("a null", [HOST, b"X-Null: a\0b"]),
    ("a control", [HOST, b"X-Bell: a\x07b"]),
    ("a bare CR", [HOST, b"X-CR: a\rb"]),
    ("a bare LF", [HOST, b"X-LF: a\nX-Next: b"]),
    ("repeated", [HOST, "X-Many: 1", "x-many: 2", "X-MANY:", "Accept: a/b", "Accept: c/d"]),
    ("repeated types", [HOST, "Content-Type: text/a", "Content-Type: text/b"]),
    ("99 copies", [HOST, *[f"X-Many: {number}" for number in range(99)]]),
    ("101 copies", [HOST, *["X-Many: v"] * 101]),
    ("90 names", [HOST, *[f"X-Name-{number}: {number}" for number in range(90)]]),
    ("long value", [HOST, "X-Long: " + "v" * 7000]),
    ("very long value", [HOST, "X-Long: " + "v" * 70_000]),
    ("long name", [HOST, "X-" + "n" * 1000 + ": v"]),
    ("cgi names", [HOST, "Remote-Addr: evil", "Path-Info: /evil", "HTTP-Host: evil", "Https: on"]),
    ("script name", [HOST, "Script-Name: /see"]),
    ("proxied", [HOST, "X-Forwarded-For: 1.2.3.4, 5.6.7.8", "X-Forwarded-For: 9.9.9.9"]),
    ("proxied scheme", [HOST, "X-Forwarded-Proto: ftp", "Forwarded: for=1.2.3.4;proto=https"]),
    ("cookies", [HOST, 'Cookie: a=1; b="x y"; a=2; c; =d; e=%3B; f=a=b']),
    ("two cookies", [HOST, "Cookie: a=1", "Cookie: b=2"]),
    ("cookies of bytes", [HOST, b"Cookie: a=\xc3\xa4; b=\xff"]),
    ("authorization", [HOST, "Authorization: Basic dXNlcjpwYXNz"]),
    ("languages", [HOST, "Accept-Language: de;q=0.5, en;q=0.9, *;q=0.1"]),
    ("connection", [HOST, "Connection: close, X-Hop", "X-Hop: 1", "Keep-Alive: timeout=5"]),
    ("upgrade to nothing", [HOST, "Upgrade: nothing"]),
    ("expects nonsense", [HOST, "Expect: nonsense"]),
    ("te", [HOST, "TE: trailers", "Trailer: X-T"]),
]

HELLO = b"hello=world&a=%C3%A4&a=2"
CHUNKED = [HOST, "Transfer-Encoding: chunked"]
FORM = "Content-Type: application/x-www-form-urlencoded"


def length(*values: str) -> list[str]:
    return [HOST, *(f"Content-Length: {value}" for value in values)]


BODIES: list[tuple[str, list[str], bytes]] = [
    ("no length", [HOST], b""),
    ("length 0", length("0"), b""),
    ("length", length("5"), b"hello"),
    ("length with zeros", length("0005"), b"hello"),
    ("length with spaces", [HOST, "Content-Length:   5  "], b"hello"),
    ("chunked", CHUNKED, chunked(b"hello ", b"world")),
    ("chunked in capitals", [HOST, "transfer-encoding: CHUNKED"], chunked(b"hello")),
    ("chunked, sizes with zeros", CHUNKED, b"0005\r\nhello\r\n000\r\n\r\n"),
    ("chunked, sizes in capitals", CHUNKED, b"A\r\n0123456789\r\nb\r\n0123456789a\r\n0\r\n\r\n"),
    ("chunked, one byte each", CHUNKED, chunked(*(bytes([n]) for n in range(256)))),
    ("chunked, nothing", CHUNKED, chunked()),
    ("chunked, extensions", CHUNKED, chunked(b"hello", extension=b";a=b;c")),
    ("chunked, quoted extension", CHUNKED, chunked(b"hello", extension=b';a="b;c"')),
    ("chunked, spaces in the extension", CHUNKED, chunked(b"hello", extension=b" ; a = b")),
    ("chunked, trailers", CHUNKED, chunked(b"hello", trailers=b"X-Trailer: a\r\nX-T: b\r\n")),
    ("chunked, large", CHUNKED, chunked(b"x" * 100_000, b"y" * 70_000)),
    ("large", length("300000"), b"z" * 300_000),
    ("expects", [*length("5"), "Expect: 100-continue"], b"hello"),
]

#: The heads of these are wrong, or at least dubious.
BAD_FRAMES: list[tuple[str, list[str], bytes]] = [
    ("negative length", length("-5"), b"hello"),
    ("length with a sign", length("+5"), b"hello"),
    ("length in hex", length("0x5"), b"hello"),
    ("length of words", length("five"), b"hello"),
    ("empty length", length(""), b""),
    ("length with a fraction", length("5.0"), b"hello"),
    ("length beyond all", length("9" * 40), b"hello"),
    ("two lengths", length("5", "6"), b"hello!"),
    ("the same length twice", length("5", "5"), b"hello"),
    ("a list of lengths", length("5, 5"), b"hello"),
    ("length and chunked", [*length("5"), "Transfer-Encoding: chunked"], chunked(b"hello")),
    ("unknown coding", [HOST, "Transfer-Encoding: cow"], b"hello"),
    ("chunked before another", [HOST, "Transfer-Encoding: chunked, gzip"], chunked(b"hello")),
    ("chunked twice", [*CHUNKED, "Transfer-Encoding: chunked"], chunked(b"hello")),
    ("identity", [HOST, "Transfer-Encoding: identity"], b""),
    ("chunked by a tab", [HOST, "Transfer-Encoding:\tchunked"], chunked(b"hello")),
    ("chunked, disguised", [HOST, "Transfer-Encoding: xchunked"], chunked(b"hello")),
]

#: The heads of these are right.
BROKEN_BODIES: list[tuple[str, list[str], bytes]] = [
    ("chunk size beyond all", CHUNKED, b"f" * 20 + b"\r\nhello\r\n0\r\n\r\n"),
    ("chunk size negative", CHUNKED, b"-5\r\nhello\r\n0\r\n\r\n"),
    ("chunk size no number", CHUNKED, b"xyz\r\nhello\r\n0\r\n\r\n"),
    ("chunk size missing", CHUNKED, b"\r\nhello\r\n0\r\n\r\n"),
    ("chunk size in hex notation", CHUNKED, b"0x5\r\nhello\r\n0\r\n\r\n"),
    ("chunk longer than its size", CHUNKED, b"3\r\nhello\r\n0\r\n\r\n"),
    ("chunks that end too early", CHUNKED, b"5\r\nhello\r\n"),
    ("a chunk that ends too early", CHUNKED, b"50\r\nhello"),
    ("a body that ends too early", length("50"), b"hello"),
]


#: What the application can do beside saying what it saw.
SPECIAL = [
    *("GET /directory", "GET /directory?a=b", "HEAD /directory/", "GET /nowhere", "HEAD /nowhere"),
    *("GET /nowhere/%FF?x", "GET /redirect?to=/see%3Fa%3Db", "POST /redirect?code=307"),
    *("GET /redirect?to=http://other.test/%C3%A4", "GET /redirect?to=k%C3%A4se%20brot&code=303"),
    *("POST /cookies", "DELETE /stream", "PURGE /form", "OPTIONS /form", "POST /early"),
    *("GET /status/204", "GET /status/205", "GET /status/299", "GET /status/304"),
    *("GET /status/404", "GET /status/599", "HEAD /status/200", "GET /abort/418", "GET /abort/401"),
    *("GET /error", "GET /cookies", "HEAD /cookies", "GET /latin", "HEAD /latin", "GET /stream"),
    *("GET /stream?pieces=0", "GET /stream?pieces=300", "HEAD /stream", "GET /stream/length"),
    *("GET /stream/length?more=5", "HEAD /stream/length"),
]


def asked(line: str, version: str) -> Request:
    method = line.partition(" ")[0]
    fields, body = with_length(b"hello") if method == "POST" else ([HOST], b"")
    return Request(line, message(f"{line} HTTP/{version}", fields, body), method)


def by_hand() -> Iterator[Request]:
    for method in METHOD_LINES:
        yield Request(f"method {method[:30]!r}", message(f"{method} /see HTTP/1.1"), method)
    yield Request("options *", message("OPTIONS * HTTP/1.1"), "OPTIONS")
    yield Request("connect", message("CONNECT example.test:80 HTTP/1.1"), "CONNECT")
    for target in TARGETS:
        line = b"GET " + as_bytes(target) + b" HTTP/1.1"
        yield Request(f"target {target[:30]!r}", message(line))
    for line in VERSIONS:
        yield Request(f"line {line!r}", message(line))
    yield Request("bare LF", message("GET /see HTTP/1.1").replace(b"\r\n", b"\n"))
    yield Request("binary", bytes(range(256)))
    for name, fields in FIELDS:
        yield Request(f"fields {name}", message("GET /see HTTP/1.1", fields))
    for name, head, body in BODIES:
        raw = message("POST /see HTTP/1.1", head, body)
        yield Request(f"body {name}", raw, "POST", late="spaces in" in name)
    for name, head, body in BAD_FRAMES:
        raw = message("POST /see HTTP/1.1", head, body)
        yield Request(f"frame {name}", raw, "POST", ends="beyond" in name)
    for name, head, body in BROKEN_BODIES:
        raw = message("POST /see HTTP/1.1", head, body)
        ends = "beyond" in name or "early" in name
        yield Request(f"broken {name}", raw, "POST", late=True, broken=True, ends=ends)
    for line in SPECIAL:
        yield asked(line, "1.1")
    old = message("POST /see HTTP/1.0", CHUNKED, chunked(b"hello"))
    yield Request("chunked in HTTP/1.0", old, "POST")


# --- By chance


def generated() -> Iterator[Request]:
    """Two hundred requests, made of the parts above and of all that the application can do."""
    chance = random.Random(SEED)
    makers = [seen, seen, seen, form, multipart, document, resource, resource, special, special]
    for _ in range(GENERATED):
        yield chance.choice(makers)(chance)


def word(chance: random.Random) -> str:
    return "".join(chance.choices("abcäöß€😀 +&=;%/?#\"'<>", k=chance.randint(1, 6)))


def path(chance: random.Random) -> str:
    pieces = [
        chance.choice([quote(word(chance)), quote(word(chance), safe=""), "x", ".", "a.b", "%ff"])
        for _ in range(chance.randint(0, 4))
    ]
    return "/".join(["/see", *pieces])


def query(chance: random.Random) -> str:
    pairs = [(word(chance), word(chance)) for _ in range(chance.randint(1, 4))]
    return chance.choice(["", "?" + urlencode(pairs), "?" + urlencode(pairs), "?a&&b=%zz&=c"])


def fields(chance: random.Random) -> list[str | bytes]:
    """A host, and a few fields of the sane and the odd."""
    chosen: list[str | bytes] = [HOST]
    for _name, some in chance.sample(FIELDS, chance.choice([0, 0, 1, 1, 2])):
        chosen += [field for field in some if not as_bytes(field).lower().startswith(b"host:")]
    if chance.random() < 0.3 and not any(as_bytes(f).startswith(b"Cookie") for f in chosen):
        chosen.append("Cookie: " + "; ".join(f"{c}={quote(word(chance))}" for c in "abc"))
    if chance.random() < 0.3:
        chosen.append("Accept: text/html, */*;q=0.1")
    if chance.random() < 0.3:
        chosen.append("Connection: " + chance.choice(["close", "keep-alive", "Keep-Alive"]))
    return chosen


def framed(chance: random.Random, body: bytes) -> tuple[list[str], bytes]:
    """The body in one piece with its length, or chunked anyhow."""
    if chance.random() < 0.6:
        return [f"Content-Length: {len(body)}"], body
    pieces, rest = [], body
    while rest:
        size = chance.randint(1, 40)
        pieces.append(rest[:size])
        rest = rest[size:]
    extension = chance.choice([b"", b"", b";a", b";a=b"])
    trailers = chance.choice([b"", b"", b"X-Trailer: 1\r\n"])
    return ["Transfer-Encoding: chunked"], chunked(*pieces, extension=extension, trailers=trailers)


def posted(
    chance: random.Random, name: str, target: str, content_type: str, body: bytes
) -> Request:
    frame, sent = framed(chance, body)
    head = [*fields(chance), f"Content-Type: {content_type}", *frame]
    raw = message(f"POST {target} HTTP/1.1", head, sent)
    return Request(name, raw, "POST")


def seen(chance: random.Random) -> Request:
    method = chance.choice(["GET", "GET", "GET", "HEAD", "DELETE", "OPTIONS", "POST", "PUT"])
    version = chance.choice(["1.1", "1.1", "1.1", "1.0"])
    head = fields(chance)
    frame, body = [], b""
    if method in ("POST", "PUT") and version == "1.1":
        frame, body = framed(chance, chance.randbytes(chance.randint(0, 200)))
    raw = message(f"{method} {path(chance)}{query(chance)} HTTP/{version}", [*head, *frame], body)
    return Request("seen", raw, method)


def form(chance: random.Random) -> Request:
    body = urlencode([(word(chance), word(chance)) for _ in range(chance.randint(0, 5))]).encode()
    return posted(chance, "form", "/form" + query(chance), FORM.partition(": ")[2], body)


def multipart(chance: random.Random) -> Request:
    parts = []
    for number in range(chance.randint(0, 3)):
        name = quote(word(chance))
        parts += [b"--limit", f'Content-Disposition: form-data; name="{name}"'.encode()]
        if chance.random() < 0.6:
            parts[-1] += f'; filename="file {number}.bin"'.encode()
            parts.append(b"Content-Type: application/octet-stream")
        parts += [b"", chance.randbytes(chance.randint(0, 300)).replace(b"--limit", b"")]
    body = b"\r\n".join([*parts, b"--limit--", b""])
    return posted(chance, "multipart", "/form", "multipart/form-data; boundary=limit", body)


def document(chance: random.Random) -> Request:
    body = json.dumps({word(chance): [word(chance), chance.random(), None]}).encode()
    if chance.random() < 0.2:
        body = body[:-1]  # not JSON: 400 by the application
    if chance.random() < 0.2:
        return posted(chance, "lines", "/lines", "text/plain", body.replace(b",", b"\n"))
    content_type = chance.choice(["application/json", "application/json; charset=utf-8", "text/x"])
    return posted(chance, "json", "/json", content_type, body)


def resource(chance: random.Random) -> Request:
    """Ranges and conditions."""
    method = chance.choice(["GET", "GET", "HEAD"])
    ranges = ["0-9", "10-", "-10", "0-0", "2000-", "0-9,20-29", "9-0", "x", "0-5000", "1039-"]
    conditions = [
        *('If-None-Match: "letters"', 'If-None-Match: W/"letters"', "If-None-Match: *"),
        *('If-None-Match: "other", "letters"', 'If-None-Match: "other"', 'If-Match: "letters"'),
        *('If-Match: "other"', "If-Modified-Since: Fri, 02 Jan 2026 03:04:05 GMT"),
        *("If-Modified-Since: Thu, 01 Jan 2026 03:04:05 GMT", "If-Modified-Since: yesterday"),
        *("If-Unmodified-Since: Thu, 01 Jan 2026 03:04:05 GMT", 'If-Range: "letters"'),
        *('If-Range: "other"',),
    ]
    head = [HOST]
    if chance.random() < 0.6:
        head.append("Range: bytes=" + chance.choice(ranges))
    head += chance.sample(conditions, chance.choice([0, 1, 1, 2]))
    target = chance.choice(["/resource", "/resource", "/download"])
    version = chance.choice(["1.1", "1.1", "1.0"])
    return Request("resource", message(f"{method} {target} HTTP/{version}", head), method)


def special(chance: random.Random) -> Request:
    """The other answers: redirects, errors, cookies, streams."""
    return asked(chance.choice(SPECIAL), chance.choice(["1.1", "1.1", "1.0"]))


def corpus() -> list[Request]:
    """All requests, each with a name of its own."""
    named = [*by_hand(), *generated()]
    return [
        replace(request, name=f"{number:03} {request.name}") for number, request in enumerate(named)
    ]
