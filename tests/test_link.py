"""The link: two memory streams on the loop between a view's thread and its socket."""

from __future__ import annotations

import gc
import threading

import anyio
import pytest

from flask_websockets import ConnectionClosed, WebSockets
from flask_websockets.bridge import Door, Link
from flask_websockets.bridge.link import State
from flask_websockets.config import Config

from .asgi_driver import TIMEOUT, connection, wait_until


class Served:
    """An application with one view that waits for permission to go on."""

    def __init__(self, app, **settings):
        app.config.update(settings)
        self.websockets = WebSockets(app)
        self.go = threading.Event()
        self.ws = None
        self.log = []
        self.asgi = self.websockets.asgi_app(app)

    def wait(self):
        assert self.go.wait(TIMEOUT)

    def used(self, direction):
        return self.ws.link.statistics()[direction].current_buffer_used

    async def __call__(self, scope, receive, send):
        await self.asgi(scope, receive, send)


def test_i2_unreceived_messages_lie_in_the_inbound_stream(run, app):
    """What the view has not received lies in the inbound stream, and drains in order."""
    served = Served(app, WEBSOCKETS_INBOX_MESSAGES=10, WEBSOCKETS_INBOX_TIMEOUT=TIMEOUT)

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        ws.accept()
        served.wait()
        served.log.extend(ws.iter_data())

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(6):
                peer.send(str(number))
            await wait_until(lambda: served.used("inbound") == 6)
            for number in range(6, 30):
                peer.send(str(number))
            # At the bound the reader pauses: it holds one message that found no room.
            await wait_until(lambda: served.used("inbound") == 10)
            reads = peer.reads
            assert reads == 1 + 11
            served.go.set()

    run(main)
    assert served.log == [str(number) for number in range(30)]


def test_i6_what_the_server_does_not_take_lies_in_the_outbound_stream(run, app):
    """With a peer that does not read the outbound stream fills to its bound; the view waits."""
    served = Served(app, WEBSOCKETS_OUTBOX_MESSAGES=20, WEBSOCKETS_SEND_TIMEOUT=TIMEOUT)

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        for number in range(100):
            ws.send(str(number))
            served.log.append(number)

    async def main():
        async with connection(served, "/ws", socket_messages=1) as peer:
            await wait_until(lambda: served.ws and len(served.ws.link._blocked) == 1)
            # 20 are not taken: the writer holds one of them, the accept has filled the socket.
            await wait_until(lambda: served.used("outbound") == 19)
            assert len(served.log) == 20
            assert await peer.get_status() == 101
            for number in range(100):
                assert (await peer.get())["text"] == str(number)
                assert served.used("outbound") <= 20
            assert (await peer.get())["code"] == 1000

    run(main)
    assert served.log == list(range(100))


def test_i6_the_outbox_is_bounded_in_bytes(run, app):
    """The bound in bytes holds too; one larger message passes when the outbox is empty."""
    served = Served(app, WEBSOCKETS_OUTBOX_BYTES=1000, WEBSOCKETS_SEND_TIMEOUT=TIMEOUT)
    sizes = [400, 400, 400, 5000, 10, 400, 400, 400]

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        for size in sizes:
            ws.send("x" * size)
            served.log.append(size)

    async def main():
        async with connection(served, "/ws", socket_messages=1) as peer:
            await wait_until(lambda: served.ws and len(served.ws.link._blocked) == 1)
            assert served.log == [400, 400]
            assert await peer.get_status() == 101
            for size in sizes:
                assert len((await peer.get())["text"]) == size
                assert served.ws.link._outbox_bytes <= 5000

    run(main)
    assert served.log == sizes


def test_i6_the_inbox_is_bounded_in_bytes(run, app):
    """The bound in bytes pauses the reader; one larger message passes when it is empty."""
    served = Served(app, WEBSOCKETS_INBOX_BYTES=1000, WEBSOCKETS_INBOX_TIMEOUT=TIMEOUT)

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        ws.accept()
        served.wait()
        served.log.extend(len(data) for data in ws.iter_data())

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            sizes = [3000, 400, 400, 400, 400, 2000, 1]
            for size in sizes:
                peer.send("x" * size)
            await wait_until(lambda: peer.reads == 3)
            assert served.used("inbound") == 1
            served.go.set()
            await wait_until(lambda: served.log == sizes)

    run(main)


def test_what_the_thread_was_handed_counts_until_it_is_taken(run, app):
    """A batch that the thread works on is not taken yet: each message it takes makes room."""
    served = Served(app, WEBSOCKETS_INBOX_MESSAGES=5, WEBSOCKETS_INBOX_TIMEOUT=TIMEOUT)

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        ws.send("ready")
        served.wait()
        served.go.clear()
        served.log.append(ws.receive())  # takes the whole batch
        served.wait()
        served.log.extend(ws.iter_data())

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            await peer.get()
            for number in range(20):
                peer.send(number * "x" + "!")
            await wait_until(lambda: served.used("inbound") == 5)
            served.go.set()
            await wait_until(lambda: served.log)
            reads = peer.reads
            await wait_until(lambda: peer.reads == 8)
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert reads in (7, 8) and peer.reads == 8
            served.go.set()
            await wait_until(lambda: len(served.log) == 20)

    run(main)
    assert [len(data) for data in served.log] == list(range(1, 21))


@pytest.mark.parametrize(
    ("policy", "code"), [("pause", 1013), ("close", 1013), ("drop_newest", None)]
)
def test_i10_a_full_inbox(run, app, caplog, policy, code):
    """pause closes 1013 after its timeout, close at once, drop_newest goes on and counts."""
    served = Served(
        app,
        WEBSOCKETS_INBOX_MESSAGES=3,
        WEBSOCKETS_INBOX_TIMEOUT=0.05,
        WEBSOCKETS_INBOX_FULL=policy,
    )

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        ws.accept()
        served.wait()
        served.log.extend(ws.iter_data())
        served.log.append(ws.close_code)

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(5):
                peer.send(str(number))
            if code is None:
                await wait_until(lambda: served.websockets.stats().inbox_dropped == 2)
                served.go.set()
                return
            message = await peer.get()
            assert (message["type"], message["code"]) == ("websocket.close", code)
            assert served.websockets.stats().inbox_closed == 1
            served.go.set()

    run(main)
    assert served.log == ["0", "1", "2", code or 1000]
    assert ("did not take what it received" in caplog.text) == (code is not None)


@pytest.mark.parametrize(
    ("limit", "before", "last"),
    [
        ({"WEBSOCKETS_INBOX_MESSAGES": 2, "WEBSOCKETS_INBOX_FULL": "close"}, 2, "x"),
        ({"WEBSOCKETS_MAX_MESSAGES_PER_SECOND": 1}, 1, "x"),
        ({"WEBSOCKETS_MAX_MESSAGE_BYTES": 5}, 0, "x" * 6),
    ],
)
def test_who_has_closed_already_is_not_closed_for_a_limit(run, app, caplog, limit, before, last):
    """A view's goodbye comes first: then no limit has closed, is counted, or is logged."""
    served = Served(app, **limit)
    closed = threading.Event()

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        ws.accept()
        served.wait()
        ws.close(4000, "enough")
        closed.set()

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            for _ in range(before):
                peer.send("x")
            await wait_until(lambda: served.ws.link.depths[0] == before)
            peer.send(last)
            served.go.set()
            assert closed.wait(TIMEOUT)  # the loop stands still: it learns of the close behind it
            message = await peer.get()
            assert (message["type"], message["code"]) == ("websocket.close", 4000)

    run(main)
    stats = served.websockets.stats()
    assert (stats.inbox_closed, stats.rate_closed, stats.oversized) == (0, 0, 0)
    assert "closed with" not in caplog.text


def test_i10_a_view_that_makes_progress_keeps_its_client(run, app):
    """Each message that the view takes makes room: steady work is no reason for a 1013."""
    served = Served(app, WEBSOCKETS_INBOX_MESSAGES=6, WEBSOCKETS_INBOX_TIMEOUT=1)

    @served.websockets.route("/ws")
    def view(ws):
        for data in ws.iter_data():
            served.log.append(data)
            ws.wait_closed(0.2)  # a full inbox takes longer than the timeout

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(14):
                peer.send(str(number))
            await wait_until(lambda: len(served.log) == 14)

    run(main)
    assert served.log == [str(number) for number in range(14)]


def test_i10_no_room_is_missed(run, app):
    """With an inbox of one message, a flood and a quick view, nobody waits for the other."""
    served = Served(app, WEBSOCKETS_INBOX_MESSAGES=1, WEBSOCKETS_INBOX_TIMEOUT=2)

    @served.websockets.route("/ws")
    def view(ws):
        served.log.extend(ws.iter_data())

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            for start in range(0, 3000, 500):
                for number in range(start, start + 500):
                    peer.send(str(number))
                await wait_until(lambda end=start + 500: peer.reads >= end)

    run(main)
    assert served.log == [str(number) for number in range(3000)]


def test_i11_a_peer_that_reads_slowly_is_not_cut(run, app):
    """A send that finds room by its deadline goes through, below the low-water mark or not."""
    served = Served(app, WEBSOCKETS_OUTBOX_MESSAGES=8, WEBSOCKETS_SEND_TIMEOUT=1)

    @served.websockets.route("/ws")
    def view(ws):
        for number in range(16):
            ws.send(str(number))
        served.log.append("all sent")
        ws.wait_closed()  # the goodbye has a deadline of its own

    async def main():
        async with connection(served, "/ws", socket_messages=1) as peer:
            assert await peer.get_status() == 101
            for number in range(16):
                assert (await peer.get())["text"] == str(number)
                await anyio.sleep(0.3)  # four to the low-water mark take longer than the deadline

    run(main)
    assert served.log == ["all sent"]


def test_i10_a_view_that_sends_only_does_not_keep_the_bridge_from_reading(run, app):
    """The disconnect is noticed while the view does not receive."""
    served = Served(app)

    @served.websockets.route("/ws")
    def view(ws):
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                ws.send("tick")
                served.go.wait(0.001)
        served.log.append(caught.value.code)

    async def main():
        async with connection(served, "/ws", socket_messages=float("inf")) as peer:
            assert await peer.get_status() == 101
            await peer.get()
            peer.leave(4001)
            await wait_until(lambda: served.log == [4001])

    run(main)


def test_i11_no_send_waits_for_ever(run, app):
    """A peer that takes nothing is given up after the send timeout, and the view unblocked."""
    served = Served(app, WEBSOCKETS_OUTBOX_MESSAGES=5, WEBSOCKETS_SEND_TIMEOUT=0.2)

    @served.websockets.route("/ws")
    def view(ws):
        ws.accept()
        with pytest.raises(ConnectionClosed) as caught:
            for number in range(1000):
                ws.send(str(number))
        served.log.append((caught.value.code, ws.closed))
        with pytest.raises(ConnectionClosed):
            ws.receive(TIMEOUT)

    async def main():
        async with connection(served, "/ws", socket_messages=1) as peer:
            with anyio.fail_after(2):
                await peer.returned.wait()
            assert served.websockets.stats().connections == 0

    run(main)
    assert served.log[0][0] == 1006


def test_i11_a_blocked_writer_is_given_up_while_the_view_only_receives(run, app):
    """The deadline is the writer's: a view that waits for a message is unblocked as well."""
    served = Served(app, WEBSOCKETS_SEND_TIMEOUT=0.2)

    @served.websockets.route("/ws")
    def view(ws):
        ws.send("1")
        ws.send("2")
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive(TIMEOUT)
        served.log.append(caught.value.code)

    async def main():
        async with connection(served, "/ws", socket_messages=1) as peer:
            with anyio.fail_after(2):
                await peer.returned.wait()
            assert served.websockets.stats().send_timeouts == 1

    run(main)
    assert served.log == [1006]


def test_a_failing_send_ends_the_connection(run, app):
    """Whatever the server raises for a peer that is gone, the view gets ConnectionClosed."""
    served = Served(app)

    @served.websockets.route("/ws")
    def view(ws):
        ws.send("x")
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive(TIMEOUT)
        served.log.append(caught.value.code)

    async def main():
        async def broken(scope, receive, send):
            async def send_once(message):
                if message["type"] == "websocket.send":
                    raise OSError("gone")
                await send(message)

            await served(scope, receive, send_once)

        async with connection(broken, "/ws") as peer:
            assert await peer.get_status() == 101
            with anyio.fail_after(TIMEOUT):
                await peer.returned.wait()

    run(main)
    assert served.log == [1006]


def test_i4_one_task_receives_and_one_sends(run, app):
    """ASGI receive is called by one task, and not after the disconnect; send by one at a time."""
    served = Served(app)
    receivers, sending, at_once, after = set(), [], [], []

    @served.websockets.route("/ws")
    def view(ws):
        with served.websockets.subscribe(ws, "a"):
            for data in ws.iter_data():
                ws.send(data)
                served.websockets.publish(data, "a")

    async def main():
        async def watched(scope, receive, send):
            left = False

            async def watched_receive():
                nonlocal left
                if left:
                    after.append(1)
                receivers.add(anyio.get_current_task().id)
                message = await receive()
                left = message["type"] == "websocket.disconnect"
                return message

            async def watched_send(message):
                sending.append(message)
                at_once.append(len(sending))
                await anyio.lowlevel.checkpoint()
                await send(message)
                sending.remove(message)

            await served(scope, watched_receive, watched_send)

        async with connection(watched, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(100):
                peer.send(str(number))
            for _ in range(200):
                await peer.get()
            peer.leave()
            with anyio.fail_after(TIMEOUT):
                await peer.returned.wait()

    run(main)
    assert len(receivers) == 1
    assert max(at_once) == 1
    assert not after


def test_i5_cancelling_the_connections_task_unblocks_the_view(run, app):
    """When the server cancels the connection its view gets ConnectionClosed, not silence."""
    served = Served(app)

    @served.websockets.route("/ws")
    def view(ws):
        ws.accept()
        with pytest.raises(ConnectionClosed):
            ws.receive(TIMEOUT)
        served.log.append("closed")

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            peer.cancel()
            await wait_until(lambda: served.log == ["closed"])
            assert peer.returned.is_set()

    run(main)


def test_no_message_falls_between_the_look_and_the_wait(run):
    """A message that comes after the view has seen an empty inbox is given to it at once."""

    class Late(Link):
        """Delivers a message at the worst moment: as the thread has just looked for one."""

        due = True

        @property
        def _received(self):
            seen = self.counted
            if self.due and threading.get_ident() != loop:
                self.due = False
                anyio.from_thread.run_sync(self.deliver, "late", 4)
            return seen

        @_received.setter
        def _received(self, count):
            self.counted = count

    async def main():
        nonlocal loop
        loop = threading.get_ident()
        link = Late(Door(1), Config())
        link._state = State.OPEN
        assert await anyio.to_thread.run_sync(link.receive, TIMEOUT) == "late"
        assert not link.due
        link.lose(1006)

    loop = 0
    run(main)


def test_an_answered_question_is_not_answered_again(run):
    """Of two messages the view asks for one; a question that comes late takes nothing away."""

    async def main():
        link = Link(Door(1), Config())
        link._state = State.OPEN
        link.deliver("first", 5)
        link._waiting = True  # the thread waits, and has asked
        link.deliver("second", 6)  # both are given
        assert link.statistics()["inbound"].current_buffer_used == 0
        link.deliver("third", 5)
        link._ask(None)  # the question arrives
        assert link.statistics()["inbound"].current_buffer_used == 1
        for expected in ("first", "second", "third"):
            assert await anyio.to_thread.run_sync(link.receive, TIMEOUT) == expected
        link.lose(1006)

    run(main)


def test_a_link_left_open_warns(run):
    """A link that nobody ended is a ResourceWarning, and so a failing test."""

    async def main():
        link = Link(Door(1), Config())
        link.write({"type": "websocket.send", "text": "a"}, 1)
        with pytest.warns(ResourceWarning, match="Unclosed <MemoryObject"):
            del link
            gc.collect()
        link = Link(Door(1), Config())
        link.write({"type": "websocket.send", "text": "a"}, 1)
        link.lose(1006)
        link.lose(1000)  # idempotent, and the first reason stays
        assert link.code == 1006
        del link
        gc.collect()

    run(main)
