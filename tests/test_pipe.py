"""The pipe between a request's thread and the loop, on asyncio and on trio."""

from __future__ import annotations

import logging
import threading

import anyio
import pytest

from flask_websockets.bridge import Door, Pipe

TIMEOUT = 8

WINDOW, PIECE = Pipe.WINDOW_BYTES, Pipe.PIECE_BYTES

#: Seconds in which something that must not happen would; no test can fail for it.
GRACE = 0.05


class InThread:
    """Runs a function in a thread, and keeps what it returned or raised."""

    def __init__(self, target, *args):
        self._returned = self._error = None
        self.done = threading.Event()
        # A daemon: a test that fails may leave it waiting.
        threading.Thread(target=self._run, args=(target, *args), daemon=True).start()

    def _run(self, target, *args):
        try:
            self._returned = target(*args)
        except BaseException as error:
            self._error = error
        finally:
            self.done.set()

    async def end(self):
        """Wait for the end of the thread; what the function returned, or raise what it raised."""
        await wait_until(self.done.is_set)
        if self._error is not None:
            raise self._error
        return self._returned


async def wait_until(condition):
    with anyio.fail_after(TIMEOUT):
        while not condition():
            await anyio.sleep(0.001)


def put_all(pipe, chunks):
    """Thread. A whole response."""
    for number, chunk in enumerate(chunks, 1):
        pipe.put(chunk, last=number == len(chunks))


async def get_all(pipe):
    """What the loop gets, each with whether it was the last; each is taken at once."""
    got, last = [], False
    while not last:
        with anyio.fail_after(TIMEOUT):
            chunk, last = await pipe.get()
        got.append((chunk, last))
        pipe.taken(len(chunk))
    return got


def read_all(pipe):
    """Thread. The pieces of a whole body."""
    return list(iter(lambda: pipe.read(TIMEOUT), b""))


@pytest.fixture
def pipes(run):
    """Run a coroutine function with a door and a pipe; at the end the pipe is closed."""

    def run_with(main):
        async def opened():
            door = Door(10)
            pipe = Pipe(door)
            try:
                await main(door, pipe)
            finally:
                pipe.close()

        run(opened)

    return run_with


class TestResponse:
    """From the thread to the loop."""

    def test_chunks_come_in_their_order(self, pipes):
        """Ten thousand chunks, several windows, come as they were put, and the last one last."""
        chunks = [b"%d," % number * 30 for number in range(10_000)]

        async def main(door, pipe):
            thread = InThread(put_all, pipe, chunks)
            got = await get_all(pipe)
            await thread.end()
            assert b"".join(chunk for chunk, _ in got) == b"".join(chunks)
            assert [last for _, last in got] == [False] * (len(got) - 1) + [True]

        pipes(main)

    def test_get_waits_for_the_next_chunk(self, pipes):
        """A chunk crosses when it is put, whether or not there is more to come."""
        go_on = threading.Event()

        def respond(pipe):
            pipe.put(b"first", last=False)
            assert go_on.wait(TIMEOUT)
            pipe.put(b"", last=True)

        async def main(door, pipe):
            thread = InThread(respond, pipe)
            assert await pipe.get() == (b"first", False)
            with anyio.move_on_after(GRACE) as waiting:
                await pipe.get()
            assert waiting.cancelled_caught
            go_on.set()
            assert await pipe.get() == (b"", True)
            await thread.end()

        pipes(main)

    def test_small_chunks_are_joined(self, pipes):
        """Up to a piece at a time, and no more; the last one is last with what is left."""
        chunks = [bytes([number % 256]) * 100 for number in range(1000)]

        async def main(door, pipe):
            thread = InThread(put_all, pipe, chunks)
            await thread.end()
            await wait_until(lambda: not door.pending)
            got = await get_all(pipe)
            sizes = [len(chunk) for chunk, _ in got]
            assert PIECE <= sizes[0] < PIECE + 100
            assert sum(sizes) == 100_000
            assert [last for _, last in got] == [False, True]
            assert b"".join(chunk for chunk, _ in got) == b"".join(chunks)

        pipes(main)

    def test_a_large_chunk_stays_as_it_is(self, pipes):
        """What is larger than a piece is passed on without a copy, alone."""
        large = b"x" * (PIECE + 1)

        async def main(door, pipe):
            thread = InThread(put_all, pipe, [large, b"y"])
            await thread.end()
            await wait_until(lambda: not door.pending)
            chunk, last = await pipe.get()
            assert chunk is large
            assert not last
            assert await pipe.get() == (b"y", True)

        pipes(main)

    @pytest.mark.parametrize("size", [PIECE, 1000, WINDOW])
    def test_i6_the_thread_waits_when_a_window_is_not_taken(self, pipes, size):
        """It waits with the window full, and goes on by as much as was taken."""
        put = []

        def respond(pipe):
            for number in range(WINDOW // size + 3):
                pipe.put(b"x" * size, last=False)
                put.append(number)

        async def main(door, pipe):
            thread = InThread(respond, pipe)
            full = -(-WINDOW // size)  # chunks
            for rounds in range(3):
                got = 0
                while got < (full if rounds == 0 else 1) * size:
                    got += len((await pipe.get())[0])
                await anyio.sleep(GRACE)
                # The last of them is there, but its put has not returned.
                assert len(put) == full - 1 + rounds
                pipe.taken(size)
            pipe.taken(WINDOW)
            await thread.end()

        pipes(main)

    def test_i6_the_window_has_places_for_so_many_chunks(self, pipes):
        """However small they are: each weighs something, and is a command at the door."""
        put = []

        def respond(pipe):
            for number in range(Pipe.WINDOW_PIECES + 1):
                pipe.put(b"x", last=False)
                put.append(number)

        async def main(door, pipe):
            thread = InThread(respond, pipe)
            got = 0
            with anyio.fail_after(TIMEOUT):
                while got < Pipe.WINDOW_PIECES:
                    got += len((await pipe.get())[0])
            await anyio.sleep(GRACE)
            assert len(put) == Pipe.WINDOW_PIECES - 1
            pipe.taken(got)
            await thread.end()

        pipes(main)

    def test_the_last_chunk_waits_for_nobody(self, pipes):
        """A thread with its whole response given is free, however large that is."""

        async def main(door, pipe):
            await InThread(put_all, pipe, [b"x" * (WINDOW - 1), b"y" * (2 * WINDOW)]).end()
            got = await get_all(pipe)
            assert sum(len(chunk) for chunk, _ in got) == 3 * WINDOW - 1

        pipes(main)

    def test_an_error_comes_after_the_chunks(self, pipes):
        """What was given before the error is not lost with it."""
        error = ValueError("of the application")

        def respond(pipe):
            pipe.put(b"x" * PIECE, last=False)
            pipe.put(b"y", last=False)
            pipe.fail(error)

        async def main(door, pipe):
            await InThread(respond, pipe).end()
            await wait_until(lambda: not door.pending)
            assert await pipe.get() == (b"x" * PIECE, False)
            assert await pipe.get() == (b"y", False)
            with pytest.raises(ValueError) as caught:
                await pipe.get()
            assert caught.value is error

        pipes(main)

    def test_an_error_wakes_who_waits(self, pipes):
        """An application that raises before its first chunk is heard at once."""
        go_on = threading.Event()

        def respond(pipe):
            assert go_on.wait(TIMEOUT)
            pipe.fail(ValueError("of the application"))

        async def main(door, pipe):
            thread = InThread(respond, pipe)
            async with anyio.create_task_group() as tasks:

                async def get():
                    with pytest.raises(ValueError, match="of the application"):
                        await pipe.get()

                tasks.start_soon(get)
                await anyio.sleep(GRACE)
                go_on.set()
            await thread.end()

        pipes(main)

    @pytest.mark.parametrize(
        "moment", ["behind the last", "before close", "after close", "without a loop"]
    )
    def test_an_error_that_nobody_raises_is_logged(self, pipes, caplog, moment):
        """Behind the last chunk and after the client has left, an error is in the log, once."""
        error = ValueError("of the application")

        def respond(pipe):
            if moment == "behind the last":
                pipe.put(b"x", last=True)
            pipe.fail(error)

        async def main(door, pipe):
            if moment == "after close":
                pipe.close()
            elif moment == "without a loop":
                door.close()
            await InThread(respond, pipe).end()
            if moment == "behind the last":
                assert await pipe.get() == (b"x", True)
            elif moment == "before close":
                # The client left in the turn in which the error came: nobody gets it.
                await wait_until(lambda: not door.pending)
                pipe.close()
            await wait_until(lambda: caplog.records)
            (record,) = caplog.records
            assert (record.name, record.levelno) == ("flask_websockets", logging.ERROR)
            assert record.exc_info[1] is error

        pipes(main)

    def test_an_answer_in_the_applications_stead(self, pipes):
        """The loop can give a whole response itself."""

        async def main(door, pipe):
            pipe.answer(b"no")
            assert await pipe.get() == (b"no", True)

        pipes(main)


class TestBody:
    """From the loop to the thread."""

    async def expect_not_wanted(self, pipe):
        with anyio.move_on_after(GRACE) as waiting:
            await pipe.wanted()
        assert waiting.cancelled_caught

    def test_read_waits_for_the_next_piece_and_ends(self, pipes):
        """A piece is read as it came and when it came; after the end there is only the end."""
        read = []

        def read_on(pipe):
            read.extend(pipe.read(TIMEOUT) for _ in range(4))

        async def main(door, pipe):
            thread = InThread(read_on, pipe)
            await pipe.wanted()
            assert read == []
            pipe.feed(b"first")
            pipe.feed(b"")  # is no end
            pipe.feed(b"second")
            await anyio.sleep(GRACE)
            assert not thread.done.is_set()
            pipe.end()
            await thread.end()
            assert read == [b"first", b"second", b"", b""]

        pipes(main)

    def test_a_piece_of_it_comes_ahead_of_the_view(self, pipes):
        """Then the loop leaves it with the client, until the view asks."""

        async def main(door, pipe):
            with anyio.fail_after(TIMEOUT):
                await pipe.wanted()
            pipe.feed(b"x" * (PIECE - 1))
            with anyio.fail_after(TIMEOUT):
                await pipe.wanted()
            pipe.feed(b"x")
            await self.expect_not_wanted(pipe)
            thread = InThread(pipe.read, TIMEOUT)
            with anyio.fail_after(TIMEOUT):
                await pipe.wanted()
            assert len(await thread.end()) == PIECE - 1

        pipes(main)

    def test_hold(self, pipes):
        """Nothing comes ahead of the view where the client waits to be asked."""

        async def main(door, pipe):
            pipe.hold()
            await self.expect_not_wanted(pipe)
            thread = InThread(pipe.read, TIMEOUT)
            with anyio.fail_after(TIMEOUT):
                await pipe.wanted()
            pipe.feed(b"x")
            assert await thread.end() == b"x"

        pipes(main)

    def test_read_ahead(self, pipes):
        """The loop may want it itself: up to a window of it."""

        async def main(door, pipe):
            pipe.hold()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pipe.wanted)
                await anyio.sleep(0)
                pipe.read_ahead()
            pipe.feed(b"x" * (WINDOW - 1))
            with anyio.fail_after(TIMEOUT):
                await pipe.wanted()
            pipe.feed(b"x")
            pipe.read_ahead()
            await self.expect_not_wanted(pipe)

        pipes(main)

    def test_i6_a_window_of_it_waits_for_the_view(self, pipes):
        """With a window unread no more is wanted; when half of it is read, there is."""

        def read(pipe, count):
            return [len(pipe.read(TIMEOUT)) for _ in range(count)]

        async def main(door, pipe):
            thread = InThread(read, pipe, 1)
            await pipe.wanted()
            for _ in range(4):
                await pipe.wanted()
                pipe.feed(b"x" * PIECE)
            await thread.end()
            await self.expect_not_wanted(pipe)
            await InThread(read, pipe, 1).end()
            with anyio.fail_after(TIMEOUT):
                await pipe.wanted()

        pipes(main)

    def test_i6_so_many_pieces_wait_for_the_view(self, pipes):
        """However small they are; a body of many more comes whole all the same."""

        async def main(door, pipe):
            pieces = 3 * Pipe.WINDOW_PIECES + 1
            for _ in range(Pipe.WINDOW_PIECES):
                pipe.feed(b"x")
            with anyio.move_on_after(GRACE) as waiting:
                await pipe.wanted()
            assert waiting.cancelled_caught
            thread = InThread(read_all, pipe)
            with anyio.fail_after(TIMEOUT):
                for _ in range(pieces - Pipe.WINDOW_PIECES):
                    await pipe.wanted()
                    pipe.feed(b"x")
            pipe.end()
            assert len(await thread.end()) == pieces

        pipes(main)

    @pytest.mark.parametrize("piece", [1000, PIECE, WINDOW // 2 - 1, WINDOW // 2, WINDOW + 1])
    def test_it_comes_whole_whatever_its_size(self, pipes, piece):
        """The thread reports seldom what it has read: never so late that both sides wait."""
        half = WINDOW // 2
        sizes = [0, 1, half - 1, half, half + 1, WINDOW - 1, WINDOW, WINDOW + 1, 5 * half - 1]

        async def main(door, _):
            for size in sizes:
                pipe = Pipe(door)
                thread = InThread(read_all, pipe)
                try:
                    with anyio.fail_after(TIMEOUT):
                        for begin in range(0, size, piece):
                            await pipe.wanted()
                            pipe.feed(b"x" * min(piece, size - begin))
                            assert pipe._unread < WINDOW + piece
                        # What wants the end is asked like any other piece.
                        await pipe.wanted()
                    pipe.end()
                    assert sum(map(len, await thread.end())) == size
                finally:
                    pipe.close()

        pipes(main)

    def test_a_silent_client(self, pipes):
        """A read ends when its time has passed, and says so; the next one goes on."""

        async def main(door, pipe):
            with pytest.raises(TimeoutError, match=r"sent nothing for 0\.01 s"):
                await InThread(pipe.read, 0.01).end()
            assert pipe.silent
            assert not pipe.broken
            pipe.feed(b"late")
            assert await InThread(pipe.read, TIMEOUT).end() == b"late"

        pipes(main)

    def test_what_came_before_the_client_left_is_read(self, pipes):
        """Then each read raises, and none of them waits."""

        async def main(door, pipe):
            pipe.feed(b"x")
            pipe.close()
            assert await InThread(pipe.read, TIMEOUT).end() == b"x"
            for _ in range(2):
                with pytest.raises(BrokenPipeError, match="left before the end of its request"):
                    await InThread(pipe.read, TIMEOUT).end()
                assert pipe.broken

        pipes(main)

    def test_a_body_that_was_whole_stays_so(self, pipes):
        """Behind the end of the body it does not matter whether the client is there."""

        async def main(door, pipe):
            pipe.feed(b"x")
            pipe.end()
            pipe.close()
            assert await InThread(read_all, pipe).end() == [b"x"]
            assert not pipe.broken

        pipes(main)

    def test_discard(self, pipes):
        """What comes behind the response is wanted without limit, and kept nowhere."""

        async def main(door, pipe):
            pipe.read_ahead()
            pipe.feed(b"x" * WINDOW)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pipe.wanted)
                await anyio.sleep(0)
                pipe.discard()
            for _ in range(3):
                await pipe.wanted()
                pipe.feed(b"y" * WINDOW)
            pipe.close()

            def read():
                assert pipe.read(TIMEOUT) == b"x" * WINDOW
                with pytest.raises(BrokenPipeError):
                    pipe.read(TIMEOUT)

            await InThread(read).end()

        pipes(main)

    def test_a_body_of_which_a_part_was_discarded_is_not_whole(self, pipes):
        """Code that reads on behind its last chunk is told so, and not given a shorter body."""

        async def main(door, pipe):
            pipe.feed(b"x")
            pipe.discard()
            pipe.feed(b"y")
            pipe.end()
            with pytest.raises(BrokenPipeError):
                await InThread(read_all, pipe).end()

        pipes(main)

    def test_a_body_of_which_nothing_was_discarded_is_whole(self, pipes):
        """Servers say that the body has ended with an empty piece."""

        async def main(door, pipe):
            pipe.feed(b"x")
            pipe.discard()
            pipe.feed(b"")
            pipe.end()
            assert await InThread(read_all, pipe).end() == [b"x"]

        pipes(main)


class TestEnd:
    """Whoever waits in the thread is released."""

    @pytest.mark.parametrize("chunk", [b"x" * WINDOW, b"x" * PIECE])
    def test_close_ends_a_thread_that_puts(self, pipes, chunk):
        """One that waits is woken, and one that would not wait learns of it all the same."""

        def respond(pipe):
            while True:
                pipe.put(chunk, last=False)

        async def main(door, pipe):
            thread = InThread(respond, pipe)
            await pipe.get()
            await anyio.sleep(GRACE)
            assert not thread.done.is_set()
            pipe.close()
            with pytest.raises(BrokenPipeError, match="Nobody reads the response"):
                await thread.end()
            assert pipe.broken

        pipes(main)

    def test_a_put_with_room_left_sees_the_close(self, pipes):
        """A generator of small chunks stops at its next one."""

        async def main(door, pipe):
            pipe.close()
            with pytest.raises(BrokenPipeError):
                await InThread(lambda: pipe.put(b"x", last=False)).end()

        pipes(main)

    def test_every_put_behind_the_close_raises(self, pipes):
        """Code that swallows the first error gets it again, and its chunks go nowhere."""

        async def main(door, pipe):
            pipe.close()
            for _ in range(3):
                with pytest.raises(BrokenPipeError):
                    await InThread(lambda: pipe.put(b"x", last=False)).end()

        pipes(main)

    def test_close_ends_a_thread_that_reads(self, pipes):
        """A read that waits is woken."""

        async def main(door, pipe):
            thread = InThread(pipe.read, TIMEOUT)
            await pipe.wanted()
            await anyio.sleep(GRACE)
            assert not thread.done.is_set()
            pipe.close()
            with pytest.raises(BrokenPipeError):
                await thread.end()

        pipes(main)

    @pytest.mark.parametrize("verb", ["read", "put"])
    def test_a_server_that_has_stopped(self, pipes, verb):
        """With the door closed nobody will answer: the thread does not wait for it."""

        async def main(door, pipe):
            door.close()

            def call():
                if verb == "read":
                    pipe.read(TIMEOUT)
                else:
                    pipe.put(b"x" * WINDOW, last=False)

            for _ in range(2):
                with pytest.raises(BrokenPipeError):
                    await InThread(call).end()
                assert pipe.broken

        pipes(main)
