"""A server under everything at once, for an hour: ``python -m tests.faults.soak --minutes 60``.

Clients come and die in every way there is, others are slow, stuck, or lost in the network; threads
publish, requests come, and some clients do nothing wrong. All of it at rates that leave half a core
idle at least. Every five seconds what the server takes is written down; at the end nobody is left,
and it must be what it was at the beginning. The exit code says whether it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import resource
import signal
import statistics
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..integration.serving import Served, serving
from . import soak_plot
from .proxy import C2S, S2C, Proxy
from .test_deaths import DEATHS, SERVED, SETTINGS, Client, Death, Rest, fetch

#: Seconds from one sample to the next.
EVERY = 5.0
#: Deaths and HTTP requests in a second.
DEATHS_PER_SECOND, REQUESTS_PER_SECOND = 25.0, 8.0
#: Connections at most that are about to die.
DYING = 200
#: Words of a client that does nothing wrong, in a second, and how many such clients there are.
WORDS_PER_SECOND, TALKERS, LISTENERS = 5.0, 12, 6
#: Seconds that such a client may wait, and that any connection may take to die.
PATIENCE, LONGEST_DEATH = 5.0, 60.0
#: Seconds for which a client stays that reads nothing, or nearly nothing.
STUCK = 20.0
#: The part of the run after which memory is looked at, and by how much of itself it may then grow.
WARM_UP, SHARE = 1 / 6, 0.10
#: Troubles that are told; the rest are counted.
TOLD = 20

#: Deadlines that a busy machine keeps as well.
SOAK_SETTINGS = {
    **SETTINGS,
    "CLOSE_TIMEOUT": 2,
    "SEND_TIMEOUT": 5,
    "HANDSHAKE_TIMEOUT": 5,
    "INBOX_TIMEOUT": 5,
    "MAX_PENDING_PUBLISHES": 1_000,
}

MORE = """
    import itertools
    import threading

    @websockets.route("/echo")
    def echo(ws):
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/async/echo")
    async def async_echo(ws):
        async for data in ws.iter_data():
            await ws.send(data)

    @websockets.route("/listen/<channel>/<on_slow>")
    def listen(ws, channel, on_slow):
        with websockets.subscribe(ws, channel, on_slow=on_slow):
            while True:
                ws.receive()

    @websockets.route("/limited", max_messages_per_second=50)
    def limited(ws):
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/deaf")
    def deaf(ws):
        ws.accept()
        while not ws.closed:
            time.sleep(0.1)

    @app.post("/upload")
    def upload():
        return str(len(request.get_data()))

    @app.get("/page")
    def page():
        return "x" * 20_000

    def publish(channel, size, seconds):
        "From before the start to the end of the process, as a feed does."
        for number in itertools.count():
            time.sleep(seconds)
            websockets.publish(str(number).ljust(size), channel)

    for feed in (("prices", 10, 0.1), ("pictures", 8_192, 0.1)):
        threading.Thread(target=publish, args=feed, daemon=True).start()
"""


@dataclass
class Sample:
    """What a server takes at one moment."""

    #: Since the beginning of the run.
    seconds: float
    resident: int
    threads: int
    descriptors: int
    connections: int
    subscriptions: int
    #: Seconds for a word and its echo, of clients that do nothing wrong, since the last sample.
    median: float | None
    p99: float | None
    #: Cores that were busy since the last sample: the server's, and the clients'.
    server_cores: float
    client_cores: float


@dataclass
class Report:
    """All of a run."""

    implementation: str
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    #: How many connections died, by the way in which they did.
    died: Counter[str] = field(default_factory=Counter)
    #: What else was done, and how often.
    done: Counter[str] = field(default_factory=Counter)
    #: What went wrong for somebody who did nothing wrong, and for whom.
    troubles: list[str] = field(default_factory=list)
    #: The server's own counters at the end.
    stats: dict[str, int] = field(default_factory=dict)
    #: Before anybody came, and after everybody left.
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    #: Growth of memory after the warm-up, by the line that fits best, in bytes an hour; and what
    #: it comes to in that time, as a part of the memory at its beginning.
    slope: float = 0.0
    growth: float = 0.0
    #: Why it failed; empty if it did not.
    failures: list[str] = field(default_factory=list)


class Soak:
    """One run against one server."""

    def __init__(self, server: Served, report: Report, seconds: float, proxy: Proxy) -> None:
        self._server = server
        self._report = report
        self._seconds = seconds
        self._proxy = proxy
        self._started = 0.0
        self._latencies: list[float] = []
        self._users = 0
        self._over = asyncio.Event()

    def trouble(self, who: str, error: BaseException) -> None:
        """Somebody had trouble who should have had none."""
        self._report.done["troubles"] += 1
        if len(self._report.troubles) < TOLD:
            at = time.monotonic() - self._started
            self._report.troubles.append(f"{at:.0f} s, {who}: {error!r} {error.__cause__ or ''}")

    async def run(self) -> None:
        """Everything at once, until the time is over or somebody interrupts."""
        self._started = time.monotonic()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._over.set)
        work: list[Coroutine[Any, Any, None]] = [
            self._sample(),
            self._at_a_rate(DEATHS_PER_SECOND, self._die),
            self._at_a_rate(REQUESTS_PER_SECOND, self._request),
            *(self._for_ever(f"talker {n}", self._talk) for n in range(TALKERS)),
            *(self._for_ever(f"listener {n}", self._listen) for n in range(LISTENERS)),
            *(self._for_ever("stuck", self._be_stuck) for _ in range(2)),
            *(self._for_ever("slow", self._be_slow) for _ in range(2)),
            self._for_ever("flood", self._flood),
            self._for_ever("flood of the deaf", self._flood_the_deaf),
            self._for_ever("lost", self._get_lost),
        ]
        tasks = [asyncio.create_task(each) for each in work]
        try:
            async with asyncio.timeout(self._seconds):
                await self._over.wait()
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._report.seconds = time.monotonic() - self._started

    # -- how often --------------------------------------------------------------------------------

    async def _at_a_rate(self, rate: float, run: Callable[[], Awaitable[None]]) -> None:
        """Start *run* so often in a second; not while too many are under way."""
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                await asyncio.sleep(random.uniform(0.5, 1.5) / rate)
                if len(running) < DYING:
                    task = asyncio.ensure_future(run())
                    running.add(task)
                    task.add_done_callback(running.discard)
                else:
                    self._report.done["held back"] += 1
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _for_ever(self, who: str, run: Callable[[], Awaitable[None]]) -> None:
        """Do it again and again."""
        await asyncio.sleep(random.uniform(0, 1))
        while True:
            try:
                await run()
                self._report.done[who] += 1
            except (OSError, asyncio.IncompleteReadError, AssertionError) as error:
                self.trouble(who, error)
                await asyncio.sleep(1)

    async def _client(self, path: str, *, port: int = 0, deaf: bool = False) -> Client:
        """An open connection."""
        client = await Client.connect(port or self._server.port, deaf=deaf)
        try:
            client.ask(path)
            async with asyncio.timeout(PATIENCE):
                assert await client.status() == 101
        except BaseException:
            client.reset()
            raise
        return client

    # -- those that do nothing wrong --------------------------------------------------------------

    async def _talk(self) -> None:
        """Say words for a minute, and hear each of them again."""
        client = await self._client(random.choice(["/echo", "/async/echo"]))
        try:
            for number in range(int(60 * WORDS_PER_SECOND)):
                await asyncio.sleep(random.uniform(0.5, 1.5) / WORDS_PER_SECOND)
                word = str(number).encode()
                started = time.monotonic()
                client.send(word)
                async with asyncio.timeout(PATIENCE):
                    assert await self._message(client) == word
                self._latencies.append(time.monotonic() - started)
            client.send((1000).to_bytes(2, "big"), opcode=8)
            async with asyncio.timeout(PATIENCE):
                assert await client.closed() == 1000
        finally:
            client.reset()

    async def _listen(self) -> None:
        """Hear a minute of a feed: every message, each once, in order."""
        client = await self._client("/listen/prices/close")
        try:
            last: int | None = None
            for _ in range(600):
                async with asyncio.timeout(PATIENCE):
                    number = int(await self._message(client))
                assert last is None or number == last + 1, f"{number} came after {last}"
                last = number
        finally:
            client.reset()

    async def _message(self, client: Client) -> bytes:
        """The next message; pings are answered."""
        while True:
            opcode, data = await client.frame()
            if opcode == 9:
                client.send(data, opcode=10)
            else:
                assert opcode in (1, 2), (opcode, data)
                return data

    async def _request(self) -> None:
        """HTTP beside it, now and then with a body."""
        method, path, body = random.choice(
            [("GET", "/page", b""), ("POST", "/upload", bytes(50_000))]
        )
        try:
            answer = await asyncio.to_thread(self._server.fetch, path, method=method, body=body)
            assert answer.status == 200, answer
            self._report.done[f"{method} {path}"] += 1
        except (OSError, AssertionError) as error:
            self.trouble(f"{method} {path}", error)

    # -- the others -------------------------------------------------------------------------------

    async def _die(self) -> None:
        """One connection that dies in one of the ways there are."""
        self._users += 1
        variant, number = divmod(self._users, len(DEATHS))
        kind = DEATHS[number]
        held: list[Client] = []
        death = Death(self._server.port, self._users, variant, held)
        try:
            async with asyncio.timeout(LONGEST_DEATH):
                await kind(death)
            self._report.died[kind.__name__] += 1
            if held:
                await asyncio.sleep(random.uniform(0, STUCK))
        except Exception as error:
            self.trouble(kind.__name__, error)
        finally:
            death.over()
            for client in held:
                client.reset()

    async def _be_stuck(self) -> None:
        """Subscribe, and read nothing."""
        policy = random.choice(["latest", "drop_oldest", "drop_newest", "close"])
        client = await self._client(f"/listen/pictures/{policy}", deaf=True)
        try:
            transport = client.writer.transport
            assert isinstance(transport, asyncio.ReadTransport)
            transport.pause_reading()
            await asyncio.sleep(random.uniform(1, 2 * STUCK))
        finally:
            client.reset()

    async def _be_slow(self) -> None:
        """Subscribe, and read one byte in a second."""
        policy = random.choice(["latest", "drop_oldest", "drop_newest"])
        client = await self._client(f"/listen/pictures/{policy}", deaf=True)
        sock = client.writer.get_extra_info("socket").dup()
        try:
            transport = client.writer.transport
            assert isinstance(transport, asyncio.ReadTransport)
            transport.pause_reading()
            for _ in range(random.randrange(1, int(2 * STUCK))):
                await asyncio.sleep(1)
                try:
                    sock.recv(1)
                except OSError:
                    break  # the server has had enough
        finally:
            sock.close()
            client.reset()

    async def _flood(self) -> None:
        """Send much more than is allowed: 1008, or a reset of what was not read."""
        client = await self._client("/limited")
        try:
            for _ in range(500):
                client.send(b"a word")
            try:
                async with asyncio.timeout(PATIENCE):
                    assert await client.closed() == 1008
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
        finally:
            client.reset()
        await asyncio.sleep(random.uniform(0, 5))

    async def _flood_the_deaf(self) -> None:
        """Send to a view that receives nothing, until its inbox has been full for too long."""
        client = await self._client("/deaf")
        patience: float = SOAK_SETTINGS["INBOX_TIMEOUT"]
        try:
            for _ in range(500):
                client.send(bytes(1_000))
            started = time.monotonic()
            try:
                async with asyncio.timeout(patience + 2 * PATIENCE):
                    assert await client.closed() == 1013
            except (ConnectionError, asyncio.IncompleteReadError):
                pass  # what it sent and nobody read takes the close frame with it
            assert time.monotonic() - started > patience / 2, "cut too early"
        finally:
            client.reset()
        await asyncio.sleep(random.uniform(0, 5))

    async def _get_lost(self) -> None:
        """A network that carries nothing any more, or one way only, and tells nobody."""
        clients: list[Client] = []
        try:
            for path in ("/echo", "/async/echo", "/listen/prices/close"):
                clients.append(await self._client(path, port=self._proxy.port))
            fault = random.choice(
                [
                    self._proxy.blackhole,
                    lambda: self._proxy.half_open(C2S),
                    lambda: self._proxy.half_open(S2C),
                ]
            )
            await asyncio.to_thread(fault)
            # The server's pings find out: after 20 s, and 20 s for the answer.
            await asyncio.sleep(random.uniform(20, 50))
        finally:
            for client in clients:
                client.reset()
            await asyncio.to_thread(self._proxy.reset)
            await asyncio.to_thread(self._proxy.pass_all)

    # -- what is written down ---------------------------------------------------------------------

    async def _sample(self) -> None:
        """Write down every five seconds what the server takes; say it every minute."""
        clock, server_time, client_time = self._started, self._server_time(), own_time()
        for number in range(1, 1_000_000):
            await asyncio.sleep(self._started + number * EVERY - time.monotonic())
            try:
                stats = await asyncio.to_thread(fetch, self._server, "/stats")
            except OSError as error:
                self.trouble("stats", error)
                continue
            latencies, self._latencies = sorted(self._latencies), []
            now, server_now, client_now = time.monotonic(), self._server_time(), own_time()
            sample = Sample(
                seconds=now - self._started,
                resident=self._server.resident_bytes(),
                threads=self._server.threads(),
                descriptors=self._server.descriptors(),
                connections=stats["connections"],
                subscriptions=stats["subscriptions"],
                median=statistics.median(latencies) if latencies else None,
                p99=latencies[int(len(latencies) * 0.99)] if latencies else None,
                server_cores=(server_now - server_time) / (now - clock),
                client_cores=(client_now - client_time) / (now - clock),
            )
            clock, server_time, client_time = now, server_now, client_now
            self._report.samples.append(sample)
            if number % 12 == 0:
                say(sample)

    def _server_time(self) -> float:
        """Seconds of a processor that the server has used."""
        fields = Path(f"/proc/{self._server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100


def own_time() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def say(sample: Sample) -> None:
    print(
        f"{sample.seconds / 60:5.1f} min  {sample.resident / 2**20:6.1f} MiB  "
        f"{sample.threads:4} threads  {sample.descriptors:4} descriptors  "
        f"{sample.connections:4} connections  p99 {(sample.p99 or 0) * 1000:6.1f} ms  "
        f"{sample.server_cores + sample.client_cores:.2f} cores",
        flush=True,
    )


# -- the verdict -----------------------------------------------------------------------------------


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope, and value at the first point, of the line that fits best (least squares)."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    slope, intercept = statistics.linear_regression(xs, ys)
    return slope, intercept + slope * xs[0]


def judge(report: Report) -> None:
    """Say what of the promises was not kept."""
    warm = [each for each in report.samples if each.seconds > report.seconds * WARM_UP]
    if len(warm) < 3:
        report.failures.append(f"{len(warm)} samples are too few")
    else:
        slope, start = fit([(each.seconds, each.resident) for each in warm])
        report.slope = slope * 3600
        report.growth = slope * (warm[-1].seconds - warm[0].seconds) / start
        if report.growth > SHARE:
            report.failures.append(f"memory grew by {report.growth:.1%} after the warm-up")
    for name, value in report.before.items():
        # Fewer are no leak: a request of the start may still be closing when they are counted.
        if report.after.get(name, math.inf) > value:
            report.failures.append(f"{name}: {value} before, {report.after.get(name)} after")
    report.failures.extend(report.troubles)
    if missing := {kind.__name__ for kind in DEATHS} - set(report.died):
        report.failures.append(f"nobody died by {', '.join(sorted(missing))}")


def soak(minutes: float, kind: str) -> Report:
    """Run it, and judge it."""
    report = Report({"fast": "websockets-sansio", "plain": "wsproto"}[kind])
    source = textwrap.dedent(SERVED) + textwrap.dedent(MORE)
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as start:
        server = start(source, kind=kind, settings=SOAK_SETTINGS)
        rest = Rest(server)
        report.before = {"threads": rest.threads, "descriptors": rest.descriptors}
        print(f"{server.url()}: {report.implementation}, for {minutes:g} minutes", flush=True)
        with Proxy(server.port) as proxy:
            asyncio.run(Soak(server, report, minutes * 60, proxy).run())
        print("Everybody leaves.", flush=True)
        try:
            rest.wait()
        except AssertionError as error:
            report.failures.append(str(error))

        def counts() -> dict[str, int]:
            return {"threads": server.threads(), "descriptors": server.descriptors()}

        deadline = time.monotonic() + 30
        while counts() != report.before and time.monotonic() < deadline:
            time.sleep(0.5)  # the threads of HTTP leave after ten idle seconds
        report.after = counts()
        report.stats = fetch(server, "/stats")
        if "Traceback" in (log := server.log()):
            report.failures.append(f"a traceback: {log.partition('Traceback')[2][:2000]}")
        code, _ = server.stop()
        if code != 0:
            report.failures.append(f"the server ended with {code}")
    judge(report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--output", type=Path, help="write all samples and figures there (JSON)")
    parser.add_argument("--plot", type=Path, help="draw them there (SVG)")
    parser.add_argument("--wsproto", action="store_true", help="wsproto, not websockets-sansio")
    options = parser.parse_args()
    report = soak(options.minutes, "plain" if options.wsproto else "fast")
    document = {**vars(report), "samples": [asdict(sample) for sample in report.samples]}
    if options.output is not None:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot is not None:
        options.plot.write_text(soak_plot.draw(document))
    if report.samples:
        say(report.samples[-1])
    print(
        f"{report.died.total()} deaths of {len(report.died)} kinds; memory "
        f"{report.slope / 2**20:+.2f} MiB an hour after the warm-up ({report.growth:+.1%} in all); "
        f"{report.before} before, {report.after} after; {dict(report.done)}"
    )
    for failure in report.failures:
        print(f"FAILED: {failure}")
    print("failed" if report.failures else "passed")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
