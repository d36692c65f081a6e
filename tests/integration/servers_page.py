"""Writes ``docs/reference/servers.rst``: ``python -m tests.integration.servers_page``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .known_servers import FAULTS, KNOWN, SERVER_OF, SERVERS, TIERS, Fault, Known, Server

PATH = Path(__file__).parents[2] / "docs" / "reference" / "servers.rst"

TOP = """\
.. Made by "python -m tests.integration.servers_page", of tests/integration/known_servers.py.

Servers
=======

.. currentmodule:: flask_websockets

The same application runs on every ASGI server, and its views cannot tell them apart by how a
connection ends: they all get :exc:`ConnectionClosed`, wherever they are. What a server cannot do
is listed here. All of it is tested: ``tox -e servers`` runs the same cases on each of them.

If you have no reason to choose another, run ``flask websockets serve``, or uvicorn: see
:doc:`/how-to/run`. Run one worker of whatever it is: channels live in the memory of the process.
"""

CAN_DO = """\
What each can do
----------------

Refusals
    A handshake is refused with the response that your view, `abort()` or `before_request` gave.
    Elsewhere the client gets a bare 403, whatever the status was, without headers and body.
    A page in a browser is told neither; other clients are.
Headers of the 101
    Those of `ws.accept(headers=...)`, and the `Set-Cookie` of a session that was changed before
    the accept. Elsewhere they are lost: set the cookie in an HTTP view before.
Our goodbye
    The client gets the code and the reason of `ws.close()`, and 1011 if the view raised.
    "1000, 3000+": codes from 1001 to 2999 cannot be sent; 3000 is added to them, so that 1011
    arrives as 4011.
The client's goodbye
    The view finds the client's code and reason in :exc:`ConnectionClosed`. Elsewhere it finds
    1006 in place of the code, or no reason.
"""

RUNS = """\
How each runs
-------------

Pings
    A server that pings finds clients that vanished without a word, and keeps quiet connections
    alive behind proxies. Elsewhere have the application send something now and then: the system
    gives a connection up when nobody acknowledges what was sent, after some minutes.
Compression
    Taken if the client offers it, as browsers do. It costs memory for each connection.
Backpressure
    A client that takes nothing makes `send` wait, and is cut after ``WEBSOCKETS_SEND_TIMEOUT``.
Lifespan
    The server tells that it starts and stops. Elsewhere channels work from the first request or
    connection on, and :meth:`WebSockets.publish` raises :exc:`NotRunning` before.
SIGTERM
    What the clients get. 1006: no goodbye, the connection is just cut. With "views not told" the
    process ends under the views: what they do at the end of a connection is left out.
    ``flask websockets serve`` closes every connection with 1012 and gives the views their time.
"""


FAULTS_TOP = """\
Faults
------

What clients, views and operators do, and what has to come of it. All of it passes under
``flask websockets serve``, with either library. Elsewhere: *pass*, or the number of what happens
instead, in the table below it. Every line is tested, and so is, where a number stands, that the
server and its other clients survive, unless the number says that they do not.

Everything is as the server has it by default, but for how long it waits for heads of requests and
after SIGTERM, where it has options for that.
"""


def page() -> str:
    """The page."""
    parts = [TOP, tiers(), commands(), CAN_DO, can_do(), RUNS, runs(), notes()]
    parts += [FAULTS_TOP, faults(), INSTEAD, instead(), skips()]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def tiers() -> str:
    lines = []
    for tier, meaning in TIERS.items():
        of_it = ", ".join(server.title for server in SERVERS if server.tier == tier)
        lines += [f"{tier.capitalize()}", f"    {of_it}. {meaning}"]
    return heading("Which one") + "\n".join(lines)


def commands() -> str:
    return heading("How to run it") + table(
        (26, 14, 42, 18),
        ["Server", "Version tested", "Command", "WebSocket library"],
        (
            [
                server.title,
                f"{server.distribution} {server.version}",
                f"``{server.run.format(app='app:asgi')}``",
                server.library,
            ]
            for server in SERVERS
        ),
    )


def can_do() -> str:
    return table(
        (28, 14, 18, 20, 20),
        ["Server", "Refusals", "Headers of the 101", "Our goodbye", "The client's goodbye"],
        (
            [
                server.title,
                yes(server.denial_responses, "403 only"),
                yes(server.accept_headers, "lost"),
                ", ".join(
                    (
                        yes(server.close_code, "1000, 3000+"),
                        *([] if server.close_reason else ["**no reason**"]),
                    )
                ),
                "yes"
                if server.client_reason
                else ("**no reason**" if server.client_code else "**1006 only**"),
            ]
            for server in SERVERS
        ),
    )


def runs() -> str:
    return table(
        (24, 26, 13, 13, 11, 13),
        ["Server", "Pings", "Compression", "Backpressure", "Lifespan", "SIGTERM"],
        (
            [
                server.title,
                server.pings,
                "yes" if server.compression else "no",
                yes(server.backpressure, "none"),
                yes(server.lifespan, "none"),
                f"{server.sigterm_code}" + ("" if server.sigterm_views else ", **views not told**"),
            ]
            for server in SERVERS
        ),
    )


def notes() -> str:
    text = heading("More about each")
    for server in SERVERS:
        text += f"{server.title}\n" + "".join(f"    - {note}\n" for note in server.notes)
    return text


INSTEAD = """\
What happens instead, and what helps:
"""


def faults() -> str:
    return table(
        (28, *[8] * len(SERVERS)),
        ["Fault", *(server.title for server in SERVERS)],
        [
            ["*Options that are set*", *(options(server) for server in SERVERS)],
            ["*Its limit of a message*", *(f"{server.message_mib} MiB" for server in SERVERS)],
            *(
                [f"{fault.what}: {fault.passes}", *(outcome(fault, each) for each in SERVERS)]
                for fault in FAULTS
            ),
        ],
    )


def options(server: Server) -> str:
    """The names of a server's options that bound what a fault may cost."""
    names = [f"``{option}``" for option in server.fault_options if option.startswith("--")]
    return ", ".join(names) or "none"


def outcome(fault: Fault, server: Server) -> str:
    """What the table says of a fault on a server."""
    numbers = numbered()
    found = {
        numbers[each.reason, each.helps]
        for each in KNOWN
        if server in servers_of(each.drivers) and set(tests_of(each)) & set(fault.tests)
    }
    return ", ".join(f"**{number}**" for number in sorted(found)) or "pass"


def numbered() -> dict[tuple[str, str], int]:
    """What happens instead and what helps, once each, in the order of the table."""
    pairs = [
        (each.reason, each.helps)
        for fault in FAULTS
        for server in SERVERS
        for each in KNOWN
        if server in servers_of(each.drivers) and set(tests_of(each)) & set(fault.tests)
    ]
    return {pair: number for number, pair in enumerate(dict.fromkeys(pairs), start=1)}


def instead() -> str:
    def servers(pair: tuple[str, str]) -> list[str]:
        knowns = [each for each in KNOWN if (each.reason, each.helps) == pair]
        return [
            f"{server.title} {each.version}"
            for server in SERVERS
            for each in knowns
            if server in servers_of(each.drivers)
        ]

    return table(
        (6, 24, 40, 30),
        ["", "Server", "What happens", "What helps"],
        (
            [f"**{number}**", ", ".join(dict.fromkeys(servers(pair))), *map(sentence, pair)]
            for pair, number in numbered().items()
        ),
    )


def sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def skips() -> str:
    return (
        heading("What cannot pass")
        + "Cases of the suite that are expected to fail beside the faults, each for a reason of "
        + "the server's. One\nthat starts to pass fails the suite.\n\n"
        + table(
            (18, 14, 34, 34),
            ["Server", "Version", "Cases", "Reason"],
            (
                [
                    ", ".join(sorted({server.title for server in servers_of(each.drivers)})),
                    each.version,
                    ", ".join(f"``{case}``" for case in cases(each.case)),
                    each.reason,
                ]
                for each in KNOWN
                if not each.helps
            ),
        )
    )


def servers_of(drivers: str) -> list[Server]:
    """Those that a known skip names."""
    return [server for driver, server in SERVER_OF.items() if re.fullmatch(drivers, driver)]


def cases(pattern: str) -> list[str]:
    r"""A known skip's pattern for people: ``test_x.*|test_y\[a\]`` is test_x and test_y[a]."""
    return [
        re.sub(r"\\(.)", r"\1", case.removesuffix(".*"))
        for case in re.split(r"\|(?=Test)", pattern)
    ]


def tests_of(known: Known) -> list[str]:
    """The tests that a known skip names, without their parameters."""
    return [case.partition("[")[0] for case in cases(known.case)]


def heading(title: str) -> str:
    return f"{title}\n{'-' * len(title)}\n\n"


def table(widths: Sequence[int], names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [".. list-table::", "    :header-rows: 1", f"    :widths: {' '.join(map(str, widths))}"]
    lines.append("")
    for row in [names, *rows]:
        lines += [f"    {'*' if not at else ' '} - {cell}" for at, cell in enumerate(row)]
    return "\n".join(lines)


def yes(answer: bool, otherwise: str) -> str:
    return "yes" if answer else f"**{otherwise}**"


if __name__ == "__main__":
    PATH.write_text(page())
