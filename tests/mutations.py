"""Removes the lines that uphold the invariants, one at a time, and sees a test turn red for each.

``python -m tests.mutations`` runs all of them, ``python -m tests.mutations I4 two-writers`` those
of one invariant and one more. The sources stay as they are: each mutation is made in a copy, and
its test runs with the copy on ``PYTHONPATH``.

Red is a test that failed, or hung until pytest-timeout ended it. A test that could not be
collected, a fixture that failed and a copy that cannot be imported are not red: they are errors
of the mutation, and fail this script as a mutation that survives does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "src" / "flask_websockets"

#: In the environment: the copy from which the tests must import the package.
COPY = "FLASK_WEBSOCKETS_COPY"
#: Runs at the same time. Most of them wait for what a mutation keeps from coming.
JOBS = 2
#: Seconds that one test may take. A mutation may make it hang, which is red.
TEST_TIMEOUT = 20
#: Seconds that all of one run may take, its threads and servers included.
RUN_TIMEOUT = 120


@dataclass(frozen=True)
class Mutation:
    """One line less, and the test that must not let it pass."""

    name: str
    invariant: str
    #: Below ``src/flask_websockets``.
    module: str
    #: Occurs exactly once in the module.
    old: str
    new: str
    #: The test that turns red: a node id, below ``tests``.
    test: str
    #: What is broken then.
    reason: str

    def mutate(self, source: str) -> str:
        """The module's source, mutated."""
        found = source.count(self.old)
        if found != 1:
            raise ValueError(
                f"{self.name}: expected its old text once in {self.module}; found {found}"
            )
        return source.replace(self.old, self.new)


MUTATIONS = (
    # -- I1: one door -------------------------------------------------------------------------
    Mutation(
        name="publish-past-the-door",
        invariant="I1",
        module="extension.py",
        old="runtime.door.post_in_slot(runtime.hub.publish, publication)",
        new="runtime.hub.publish(publication)",
        test="test_channels.py::test_sends_and_publishes_of_one_thread_keep_their_order",
        reason="The publisher's thread runs the hub, beside the loop and ahead of its own sends.",
    ),
    Mutation(
        name="thread-beside-the-bridge",
        invariant="I1",
        module="running_view.py",
        old="self._ident = start_view_thread(run_and_report, ",
        new="import threading\n\n"
        "        threading.Thread(target=run_and_report, daemon=True).start()\n"
        "        self._ident = len(",
        test="test_architecture.py::TestSides::test_only_the_crossings_cross[running_view]",
        reason="A module of the loop's side starts threads past the bridge.",
    ),
    Mutation(
        name="newest-command-first",
        invariant="I1",
        module="bridge/door.py",
        old="command, argument = self._commands.popleft()",
        new="command, argument = self._commands.pop()",
        test="test_door.py::test_i1_commands_run_on_the_loop_in_their_order",
        reason="What threads post is answered in another order than it was posted in.",
    ),
    # -- I2: streams live on the loop -----------------------------------------------------------
    Mutation(
        name="thread-takes-from-the-stream",
        invariant="I2",
        module="bridge/link.py",
        old="self._post_quietly(self._ask, None)",
        new="self._ask(None)",
        test="test_mutation_gaps.py::test_i2_no_thread_touches_a_stream",
        reason="A view's receive takes from the inbound stream in its own thread.",
    ),
    Mutation(
        name="thread-puts-into-the-stream",
        invariant="I2",
        module="bridge/link.py",
        old="self._door.post(self._move, (message, size))",
        new="self._move((message, size))",
        test="test_mutation_gaps.py::test_i2_no_thread_touches_a_stream",
        reason="A view's send puts into the outbound stream in its own thread.",
    ),
    Mutation(
        name="waits-after-the-look",
        invariant="I2",
        module="bridge/link.py",
        old="""            self._asked = self._waiting = True  # stay so after a timeout
            if self._received != self._taken:  # all that was handed over has been taken
                self._post_quietly(self._ask, None)
""",
        new="""            if self._received != self._taken:
                self._post_quietly(self._ask, None)
            self._asked = self._waiting = True
""",
        test="test_link.py::test_no_message_falls_between_the_look_and_the_wait",
        reason="A message that comes between the look and the wait is left lying.",
    ),
    Mutation(
        name="question-answered-twice",
        invariant="I2",
        module="bridge/link.py",
        old="if self._waiting and not self._inbox_ended and self._received != self._taken:",
        new="if not self._inbox_ended and self._received != self._taken:",
        test="test_link.py::test_an_answered_question_is_not_answered_again",
        reason="A question that arrives late takes what the thread does not wait for.",
    ),
    # -- I3: the handshake goes through app.wsgi_app ----------------------------------------------
    Mutation(
        name="past-the-middleware",
        invariant="I3",
        module="extension.py",
        old="lambda environ, start_response: found.wsgi_app(environ, start_response),",
        new="lambda environ, start_response: type(found).wsgi_app(found, environ, start_response),",
        test="test_views.py::test_i3_the_handshake_goes_through_middleware",
        reason="Flask is called without what is wrapped around its wsgi_app.",
    ),
    Mutation(
        name="application-called-twice",
        invariant="I3",
        module="answers.py",
        old="chunks = app(environ, start_response)",
        new="app(environ, start_response)\n        chunks = app(environ, start_response)",
        test="test_views.py::test_i3_hooks_run_once_in_one_thread",
        reason="One handshake is two WSGI calls, and the view runs twice.",
    ),
    Mutation(
        name="handshake-from-the-beginning",
        invariant="I3",
        module="servers/werkzeug.py",
        old="Upgrade(app=self._wsgi_app, environ=environ, ",
        new="Upgrade(environ=environ, ",
        test="integration/test_app_run.py"
        "::test_i3_each_middleware_sees_a_handshake_once_under_app_run",
        reason="Under app.run() the middleware outside sees each handshake twice.",
    ),
    Mutation(
        name="no-origin-check",
        invariant="I3",
        module="views.py",
        old="        check_origin(route.origins, link)\n",
        new="",
        test="test_views.py::test_a_foreign_origin_is_refused",
        reason="A page of any origin may open a WebSocket.",
    ),
    Mutation(
        name="no-connection-limit",
        invariant="I3",
        module="runtime.py",
        old="if self._admitted + self._orphans >= config.max_connections:",
        new="if False:",
        test="test_asgi.py::test_i3_above_the_limit_503_without_a_thread",
        reason="WEBSOCKETS_MAX_CONNECTIONS is not kept.",
    ),
    Mutation(
        name="limit-after-the-thread",
        invariant="I3",
        module="asgi.py",
        old="        if refusal is not None:\n",
        new="        if refusal is not None:\n"
        "            await self._start(runtime, entry, scope, receive, send)\n",
        test="test_asgi.py::test_i3_above_the_limit_503_without_a_thread",
        reason="A handshake that is turned away has taken a thread first.",
    ),
    Mutation(
        name="no-handshake-limit",
        invariant="I3",
        module="asgi.py",
        old="limit = self._config.max_handshakes",
        new="limit = 1_000_000",
        test="test_asgi.py::test_handshakes_queue_and_then_get_503",
        reason="WEBSOCKETS_MAX_HANDSHAKES is not kept.",
    ),
    Mutation(
        name="underscores-pose-as-hyphens",
        invariant="I3",
        module="environ.py",
        old="""if b"_" in raw_name or raw_name.startswith(b":"):""",
        new="""if raw_name.startswith(b":"):""",
        test="test_environ.py::TestEnviron::test_underscore_headers_are_dropped",
        reason="X_Forwarded_For poses as X-Forwarded-For, past every proxy that guards the one.",
    ),
    # -- I4: one reader, one writer -----------------------------------------------------------
    Mutation(
        name="two-writers",
        invariant="I4",
        module="bridge/link.py",
        old="if not self._is_writing and self.start_writer is not None:",
        new="if self.start_writer is not None:",
        test="test_link.py::test_i4_one_task_receives_and_one_sends",
        reason="Two tasks send on one connection.",
    ),
    Mutation(
        name="short-way-past-the-writer",
        invariant="I4",
        module="bridge/link.py",
        old="if self.inline is None or self._outbox_messages:",
        new="if self.inline is None:",
        test="test_mutation_gaps.py::test_i4_the_short_way_is_for_an_idle_writer_only",
        reason="The short way is taken while the writer sends, and overtakes the outbox.",
    ),
    Mutation(
        name="short-way-for-anything",
        invariant="I4",
        module="servers/uvicorn.py",
        old="        return protocol\n    return None\n",
        new="        return protocol\n    return protocol\n",
        test="test_mutation_gaps.py::test_i4_an_unknown_send_has_no_short_way",
        reason="The send of any object is stepped as if it were uvicorn's.",
    ),
    Mutation(
        name="short-way-for-another-method",
        invariant="I4",
        module="servers/uvicorn.py",
        old="""        and getattr(send, "__func__", None) is getattr(kind, "send", None)\n""",
        new="",
        test="test_mutation_gaps.py::test_i4_an_unknown_send_has_no_short_way",
        reason="Any method of uvicorn's protocol passes for its send, a wrapper included.",
    ),
    Mutation(
        name="receive-after-the-disconnect",
        invariant="I4",
        module="connection.py",
        old=""" or 1005, message.get("reason") or "")
                    return
""",
        new=""" or 1005, message.get("reason") or "")
""",
        test="test_link.py::test_i4_one_task_receives_and_one_sends",
        reason="receive is called again after the disconnect, where hypercorn and daphne hang.",
    ),
    # -- I5: close, don't cancel ----------------------------------------------------------------
    Mutation(
        name="unsubscribe-not-in-finally",
        invariant="I5",
        module="subscription.py",
        old="""        \"\"\"Unsubscribe, from what no outer block has subscribed to.\"\"\"
        self._leave()
""",
        new="""        if error is None:
            self._leave()
""",
        test="test_channels.py::test_nothing_is_left_behind_whatever_the_body_raises",
        reason="A subscribe block that raises stays subscribed.",
    ),
    Mutation(
        name="subscriptions-outlive-the-connection",
        invariant="I5",
        module="runtime.py",
        old="            self.hub.forget(connection.link)\n",
        new="",
        test="test_channels.py::test_a_view_that_is_stuck_in_its_block_is_forgotten",
        reason="A connection that is over stays subscribed.",
    ),
    Mutation(
        name="goodbye-in-except",
        invariant="I5",
        module="views.py",
        old="""            # In finally: SystemExit closes with 1011 as well (I5).
            if link.state is State.OPEN:
""",
        new="""            if link.state is State.OPEN and isinstance(raised, Exception):
""",
        test="test_mutation_gaps.py::test_i5_a_view_that_exits_closes_1011_behind_any_middleware",
        reason="SystemExit in a view closes as if the view had returned.",
    ),
    Mutation(
        name="exit-not-caught",
        invariant="I5",
        module="answers.py",
        old="except BaseException as raised:",
        new="except Exception as raised:",
        test="test_views.py::test_i5_a_view_that_exits_closes_1011",
        reason="SystemExit ends the view's thread without a word to anybody.",
    ),
    Mutation(
        name="cancelled-connection-keeps-its-link",
        invariant="I5",
        module="connection.py",
        old="            link.lose(1006)\n",
        new="            pass\n",
        test="test_link.py::test_i5_cancelling_the_connections_task_unblocks_the_view",
        reason="A server that cancels the connection leaves its view waiting.",
    ),
    Mutation(
        name="blocked-send-outlives-the-peer",
        invariant="I5",
        module="bridge/link.py",
        old="        self._outbound.close()\n        self._unblock(None)\n",
        new="        self._outbound.close()\n",
        test="test_mutation_gaps.py::test_i5_a_blocked_send_ends_with_its_connection[asyncio-leave]",
        reason="A send that waits for room does not learn that its peer has left.",
    ),
    Mutation(
        name="blocked-send-outlives-the-close",
        invariant="I5",
        module="bridge/link.py",
        old="        self.deaf = True\n        self._unblock(None)",
        new="        self.deaf = True\n",
        test="test_mutation_gaps.py::test_i5_a_blocked_send_ends_with_its_connection[asyncio-close]",
        reason="A send that waits for room does not learn that another thread has closed.",
    ),
    Mutation(
        name="response-not-closed",
        invariant="I5",
        module="wsgi.py",
        old="""                if hasattr(chunks, "close"):
                    chunks.close()
""",
        new="                pass\n",
        test="test_wsgi.py::TestCall::test_chunks_are_passed_on_one_by_one",
        reason="The application is not told that its response is over: teardown never runs.",
    ),
    Mutation(
        name="short-response-passes-for-whole",
        invariant="I5",
        module="wsgi.py",
        old="if promised is not None and self._given < promised:",
        new="if False:",
        test="test_wsgi.py::TestLength::test_a_body_that_is_shorter_is_an_error",
        reason="A response that is shorter than its Content-Length ends as if it were whole.",
    ),
    Mutation(
        name="exit-of-a-request-ends-the-server",
        invariant="I5",
        module="wsgi.py",
        old="            self._pipe.fail(wrapped)",
        new="            self._pipe.fail(error)",
        test="test_wsgi.py::TestErrors::test_what_ends_a_thread_is_wrapped",
        reason="SystemExit and CancelledError of an application are raised in the server's task.",
    ),
    Mutation(
        name="own-broken-pipe-swallowed",
        invariant="I5",
        module="wsgi.py",
        old="""            if not self._pipe.broken:
                self._pipe.fail(error)
""",
        new="            pass\n",
        test="test_wsgi.py::TestErrors::test_the_same_errors_of_the_applications_own",
        reason="A BrokenPipeError of the application's own ends its response without a word.",
    ),
    Mutation(
        name="pipe-left-open",
        invariant="I5",
        module="http.py",
        old="                pipe.close()  # the thread learns of it at once\n",
        new="",
        test="test_http_contract.py::test_i5_a_task_that_is_cancelled_lets_its_thread_go",
        reason="A request that is over leaves its thread waiting, for ever.",
    ),
    Mutation(
        name="leave-behind-an-upload-unseen",
        invariant="I5",
        module="http.py",
        old="            self._pipe.read_ahead()\n",
        new="",
        test="test_http_contract.py::test_i5_a_client_that_leaves_in_its_upload_is_seen",
        reason="A client that leaves is not seen while its body waits for a view that reads none.",
    ),
    Mutation(
        name="upload-in-the-way-of-the-end",
        invariant="I5",
        module="http.py",
        old="                self._pipe.discard()\n",
        new="",
        test="test_http_contract.py::test_the_end_of_the_response_comes_behind_the_body",
        reason="hypercorn waits for room behind a body that nobody takes, with the last chunk.",
    ),
    Mutation(
        name="end-cuts-the-last-send",
        invariant="I5",
        module="http.py",
        old="if not self._finishing:",
        new="if True:",
        test="test_http_contract.py::test_the_last_send_is_not_cut_short",
        reason="hypercorn says within the last send that the exchange is over, and is cancelled.",
    ),
    Mutation(
        name="server-asked-for-ever",
        invariant="I5",
        module="http.py",
        old="await anyio.sleep_forever()",
        new="continue",
        test="test_http_scopes.py::TestMessages::test_a_server_that_repeats_the_end",
        reason="A server that repeats the end of the body is asked for ever: the loop spins.",
    ),
    Mutation(
        name="error-in-a-group",
        invariant="I5",
        module="http.py",
        old="                self._error = error  # raised as itself, not in a group\n",
        new="                raise\n",
        test="test_http_contract.py::test_an_error_of_send_is_raised_as_itself",
        reason="What a request raises reaches the server in an ExceptionGroup.",
    ),
    Mutation(
        name="discarded-body-passes-for-whole",
        invariant="I5",
        module="bridge/pipe.py",
        old='None if self._incomplete else b""',
        new='b""',
        test="test_pipe.py::TestBody::test_a_body_of_which_a_part_was_discarded_is_not_whole",
        reason="Code that reads the body behind its response gets a shorter one, and no error.",
    ),
    # -- I6: every buffer is bounded --------------------------------------------------------------
    Mutation(
        name="inbox-without-messages-bound",
        invariant="I6",
        module="bridge/link.py",
        old="held >= self.config.inbox_messages or held_bytes",
        new="held_bytes",
        test="test_link.py::test_what_the_thread_was_handed_counts_until_it_is_taken",
        reason="WEBSOCKETS_INBOX_MESSAGES is not kept.",
    ),
    Mutation(
        name="inbox-without-bytes-bound",
        invariant="I6",
        module="bridge/link.py",
        old=" or held_bytes + size > self.config.inbox_bytes",
        new="",
        test="test_link.py::test_i6_the_inbox_is_bounded_in_bytes",
        reason="WEBSOCKETS_INBOX_BYTES is not kept.",
    ),
    Mutation(
        name="outbox-without-messages-bound",
        invariant="I6",
        module="bridge/link.py",
        old="messages < self.config.outbox_messages / share\n            and ",
        new="",
        test="test_link.py::test_i6_what_the_server_does_not_take_lies_in_the_outbound_stream",
        reason="WEBSOCKETS_OUTBOX_MESSAGES is not kept.",
    ),
    Mutation(
        name="outbox-without-bytes-bound",
        invariant="I6",
        module="bridge/link.py",
        old="\n            and taken <= self.config.outbox_bytes / share",
        new="",
        test="test_link.py::test_i6_the_outbox_is_bounded_in_bytes",
        reason="WEBSOCKETS_OUTBOX_BYTES is not kept.",
    ),
    Mutation(
        name="slow-subscriber-kept",
        invariant="I6",
        module="bridge/link.py",
        old="        if left is message and not self._fits(size):\n            return False\n",
        new="",
        test="test_channels.py::test_i6_a_slow_subscriber_is_closed_and_counted",
        reason="What is published fills the outbox of a subscriber that does not read.",
    ),
    Mutation(
        name="slow-subscriber-not-counted",
        invariant="I6",
        module="channels.py",
        old="            self._counters.closed_slow += 1\n",
        new="",
        test="test_channels.py::test_i6_a_slow_subscriber_is_closed_and_counted",
        reason="Subscribers that are closed as slow do not show in the statistics.",
    ),
    Mutation(
        name="slots-without-end",
        invariant="I6",
        module="bridge/door.py",
        old="return self._slots.pop()",
        new="return None",
        test="test_door.py::test_i6_pending_publishes_are_bounded",
        reason="The door has a place for any number of publishes.",
    ),
    Mutation(
        name="publish-without-slot",
        invariant="I6",
        module="extension.py",
        old="            runtime.door.take_slot(runtime.config.send_timeout)\n",
        new="",
        test="test_mutation_gaps.py::test_i6_what_waits_at_the_door_is_bounded[asyncio-publish]",
        reason="publish takes no place at the door.",
    ),
    Mutation(
        name="subscribe-without-slot",
        invariant="I6",
        module="bridge/link.py",
        old="            self._door.take_slot(self.config.send_timeout)\n",
        new="            pass\n",
        test="test_mutation_gaps.py::test_i6_what_waits_at_the_door_is_bounded[asyncio-subscribe]",
        reason="subscribe takes no place at the door.",
    ),
    Mutation(
        name="http-queue-without-end",
        invariant="I6",
        module="bridge/threads.py",
        old="if self._busy >= self._size * (1 + QUEUED_PER_THREAD):",
        new="if False:",
        test="test_asgi.py::test_i8_http_requests_queue_and_then_get_503",
        reason="Any number of HTTP requests wait for the pool.",
    ),
    Mutation(
        name="response-without-window",
        invariant="I6",
        module="bridge/pipe.py",
        old="self._window_is_full or ",
        new="",
        test="test_pipe.py::TestResponse::test_i6_the_thread_waits_when_a_window_is_not_taken",
        reason="A response of any size lies in memory for a client that does not read.",
    ),
    Mutation(
        name="body-without-window",
        invariant="I6",
        module="bridge/pipe.py",
        old="self._unread >= self._room or ",
        new="",
        test="test_pipe.py::TestBody::test_i6_a_window_of_it_waits_for_the_view",
        reason="A body of any size lies in memory for a view that does not read.",
    ),
    Mutation(
        name="copies-without-end",
        invariant="I6",
        module="environ.py",
        old="if len(copies) == MAX_COPIES:",
        new="if False:",
        test="test_http_scopes.py::TestScopes::test_copies_of_a_header",
        reason="A client may send any number of copies of a header, and all are joined.",
    ),
    # -- I7: the hub has one thread -------------------------------------------------------------
    Mutation(
        name="fan-out-without-snapshot",
        invariant="I7",
        module="channels.py",
        old="recipients.update(self._channels.get(name, {}))",
        new="recipients = self._channels.get(name, {})",
        test="test_channels.py::test_exclude_takes_one_connection_or_several",
        reason="Fan-out works on the channel itself: whom a publish excludes is unsubscribed.",
    ),
    Mutation(
        name="late-subscribe-stays",
        invariant="I7",
        module="channels.py",
        old="        if link.deaf:\n            return  # its connection ended",
        new="        if False:\n            return  # its connection ended",
        test="test_mutation_gaps.py::test_i7_a_subscribe_that_comes_too_late_leaves_nothing",
        reason="The hub changes without having looked, and keeps who is gone for ever.",
    ),
    Mutation(
        name="apublish-ahead-of-the-door",
        invariant="I7",
        module="extension.py",
        old="        runtime.door.drain()\n        return runtime.hub.publish(publication)\n",
        new="        return runtime.hub.publish(publication)\n",
        test="test_channels.py::test_apublish_comes_after_what_threads_published",
        reason="The loop's own publish overtakes what threads published before.",
    ),
    # -- I8: sockets never starve HTTP ------------------------------------------------------------
    Mutation(
        name="views-on-the-http-pool",
        invariant="I8",
        module="asgi.py",
        old="        self._http: tuple[Runtime, HttpAdapter] | None = None\n",
        new="""        self._http = None
        from .bridge.handover import Relay

        pool = HttpPool(config.http_threads, Relay(None))
        globals()["HttpPool"] = lambda *arguments: pool
        from . import running_view

        running_view.start_view_thread = lambda run, name, **how: pool.submit(run)
""",
        test="test_asgi.py::test_i8_blocked_views_do_not_starve_http",
        reason="Views and HTTP share one limit of threads.",
    ),
    Mutation(
        name="views-under-a-limit-of-40",
        invariant="I8",
        module="bridge/threads.py",
        old="    thread.start()\n    assert thread.ident is not None  # it has started\n",
        new="""    globals().setdefault("_pool", HttpPool(40, Relay(None))).submit(run)
    return 0
""",
        test="test_asgi.py::test_i8_blocked_views_do_not_starve_http",
        reason="Views have a pool of their own, but of 40 threads, as anyio's limiter has.",
    ),
    Mutation(
        name="http-on-one-thread",
        invariant="I8",
        module="asgi.py",
        old="HttpPool(config.http_threads,",
        new="HttpPool(1,",
        test="test_asgi.py::test_http_runs_in_parallel",
        reason="HTTP requests wait for each other on one thread, as in asgiref.",
    ),
    Mutation(
        name="http-threads-without-limit",
        invariant="I8",
        module="bridge/threads.py",
        old="self._busy >= self._threads and self._threads < self._size",
        new="self._busy >= self._threads",
        test="test_threads.py::test_i8_at_most_size_threads",
        reason="WEBSOCKETS_HTTP_THREADS is not kept.",
    ),
    Mutation(
        name="work-without-a-thread",
        invariant="I8",
        module="bridge/threads.py",
        old="""                        self._busy -= 1
                        return False
""",
        new="                        pass\n",
        test="test_threads.py::TestNoThreadLeft::test_without_any_thread_the_work_is_refused",
        reason="With no thread left a request waits in the queue, and is not told to try again.",
    ),
    Mutation(
        name="context-not-copied",
        invariant="I8",
        module="http.py",
        old="partial(context.run, call.run_wsgi_app, environ)",
        new="partial(call.run_wsgi_app, environ)",
        test="test_http_flask.py"
        "::test_the_variables_of_an_asgi_middleware_reach_everything_of_a_request",
        reason="A request's thread sees nothing of the context of its task.",
    ),
    # -- I9: shutdown is bounded ------------------------------------------------------------------
    Mutation(
        name="views-keep-the-process",
        invariant="I9",
        module="bridge/threads.py",
        old="args=(run, yields), name=name, daemon=True",
        new="args=(run, yields), name=name, daemon=False",
        test="test_mutation_gaps.py::test_i9_view_and_http_threads_are_daemons",
        reason="A view in time.sleep(600) keeps the process alive.",
    ),
    Mutation(
        name="http-keeps-the-process",
        invariant="I9",
        module="bridge/threads.py",
        old="""name=f"flask-websockets-http-{number}", daemon=True""",
        new="""name=f"flask-websockets-http-{number}", daemon=False""",
        test="test_mutation_gaps.py::test_i9_view_and_http_threads_are_daemons",
        reason="A request that hangs keeps the process alive.",
    ),
    Mutation(
        name="connection-waits-for-its-view",
        invariant="I9",
        module="running_view.py",
        old="with anyio.move_on_after(timeout):",
        new="with anyio.move_on_after(None):",
        test="test_asgi.py::test_i9_a_stuck_view_is_reported_and_keeps_its_place",
        reason="A connection's task ends when its view does, and not before.",
    ),
    Mutation(
        name="stuck-view-gives-up-its-place",
        invariant="I9",
        module="runtime.py",
        old="                self._orphans += 1\n",
        new="                pass\n",
        test="test_asgi.py::test_i9_a_stuck_view_is_reported_and_keeps_its_place",
        reason="Threads that are left to themselves are not counted, and add up without limit.",
    ),
    Mutation(
        name="shutdown-ends-nothing",
        invariant="I9",
        module="runtime.py",
        old="connection.link.lose(*GOODBYE)",
        new="pass",
        test="test_asgi.py::test_the_shutdown_ends_what_is_still_connected",
        reason="A server that stops waits for connections that nobody ends.",
    ),
    Mutation(
        name="drain-lets-everybody-in",
        invariant="I9",
        module="runtime.py",
        old="            self._draining = True\n",
        new="            pass\n",
        test="test_drain.py::test_i9_a_drain_refuses_handshakes_and_serves_http",
        reason="A drain that goes on accepting connections never ends.",
    ),
    Mutation(
        name="drain-drops-the-outbox",
        invariant="I9",
        module="bridge/link.py",
        old="        self._door.drain()  # what threads sent before\n",
        new="        self._drop_outbox()\n",
        test="test_drain.py::test_i9_a_drain_closes_after_what_was_sent",
        reason="What was sent before the drain is lost.",
    ),
    Mutation(
        name="drain-without-an-end",
        invariant="I9",
        module="runtime.py",
        old="        await self._all_over(start + timeout)\n",
        new="        await self._all_over(math.inf)\n",
        test="test_drain.py::test_i9_a_drain_has_an_end",
        reason="A view that stays, or a peer that takes nothing, keeps the server.",
    ),
    Mutation(
        name="drain-does-not-cancel",
        invariant="I9",
        module="runtime.py",
        old="            connection.view.cancel()\n",
        new="            pass\n",
        test="test_drain.py::test_i9_an_async_view_is_cancelled_at_the_end_of_a_drain",
        reason="An async view's finally does not run before the process ends.",
    ),
    Mutation(
        name="no-watchdog",
        invariant="I9",
        module="servers/watchdog.py",
        old="        os._exit(code)\n",
        new="        pass\n",
        test="integration/test_serve_drain.py::test_whatever_does_not_end_is_cut",
        reason="A thread that is no daemon, or a blocked loop, keeps a process told to end.",
    ),
    Mutation(
        name="heads-without-a-limit",
        invariant="I9",
        module="servers/uvicorn.py",
        old="self.loop.call_later(self.head_timeout, self.transport.abort)",
        new="None",
        test="integration/test_serve.py::test_slow_request_heads_are_cut",
        reason="A client that dribbles its request head keeps its connection for ever.",
    ),
    # -- I10: the bridge always reads -------------------------------------------------------------
    Mutation(
        name="reader-waits-for-the-view",
        invariant="I10",
        module="connection.py",
        old="""                self._idle = True
                message = await receive()
""",
        new="""                while not link._waiting:
                    await anyio.sleep(0.001)
                message = await receive()
""",
        test="test_link.py::test_i10_a_view_that_sends_only_does_not_keep_the_bridge_from_reading",
        reason="Nothing is read while the view does not receive.",
    ),
    Mutation(
        name="reader-pauses-for-ever",
        invariant="I10",
        module="connection.py",
        old="anyio.current_time() + config.inbox_timeout\n",
        new="math.inf\n",
        test="test_link.py::test_i10_a_full_inbox",
        reason="A full inbox stops the reader without limit.",
    ),
    Mutation(
        name="full-inbox-not-counted",
        invariant="I10",
        module="connection.py",
        old="        self.counters.inbox_closed += 1\n",
        new="",
        test="test_link.py::test_i10_a_full_inbox",
        reason="Connections that are closed for a full inbox do not show in the statistics.",
    ),
    # -- I11: no send waits for ever ------------------------------------------------------------
    Mutation(
        name="no-send-deadline",
        invariant="I11",
        module="writer.py",
        old="            deadline.set(link.config.send_timeout, connection.time_out_send)\n",
        new="",
        test="test_link.py::test_i11_a_blocked_writer_is_given_up_while_the_view_only_receives",
        reason="The writer waits without limit for a peer that takes nothing.",
    ),
    Mutation(
        name="no-deadline-in-the-view",
        invariant="I11",
        module="bridge/link.py",
        old="if not turn.acquire(timeout=max(0.0, deadline - time.monotonic())):",
        new="if not turn.acquire():",
        test="test_mutation_gaps.py::test_i11_a_send_has_a_deadline_even_if_the_loop_hangs",
        reason="A view's send waits without limit for a loop that makes no room.",
    ),
    Mutation(
        name="no-abort",
        invariant="I11",
        module="connection.py",
        old="            uvicorn.abort(self._protocol)\n",
        new="",
        test="test_mutation_gaps.py::test_i11_a_peer_that_takes_nothing_is_aborted",
        reason="A connection that is given up keeps its descriptor while its peer does not read.",
    ),
    Mutation(
        name="nobody-is-watched",
        invariant="I11",
        module="runtime.py",
        old="            self._watch.add(connection.protocol)\n",
        new="            pass\n",
        test="test_mutation_gaps.py::test_i11_a_transport_that_cannot_close_is_aborted",
        reason="A transport that uvicorn closes stays for as long as its peer does not read.",
    ),
    Mutation(
        name="watch-without-abort",
        invariant="I11",
        module="servers/uvicorn.py",
        old="                abort(protocol)\n",
        new="",
        test="test_servers_uvicorn.py::test_the_watch_aborts_what_cannot_close",
        reason="The watch sees transports that cannot close, and leaves them.",
    ),
    Mutation(
        name="no-deadline-for-a-response",
        invariant="I11",
        module="http.py",
        old="with anyio.move_on_after(self._send_timeout) as deadline:",
        new="with anyio.move_on_after(None) as deadline:",
        test="test_http_contract.py::test_i11_a_client_that_takes_nothing_is_given_up",
        reason="A request waits without limit for a client that does not read its response.",
    ),
    # -- I12: we say goodbye ourselves ----------------------------------------------------------
    Mutation(
        name="return-is-no-normal-end",
        invariant="I12",
        module="views.py",
        old="        code = 1000\n",
        new="",
        test="test_views.py::test_i12_a_view_that_returns_closes_1000",
        reason="A view that returns closes as if it had raised.",
    ),
    Mutation(
        name="raise-is-a-normal-end",
        invariant="I12",
        module="views.py",
        old="code, reason = self._link, 1011, ",
        new="code, reason = self._link, 1000, ",
        test="test_views.py::test_i12_a_view_that_raises_closes_1011",
        reason="A view that raises closes as if it had returned.",
    ),
    Mutation(
        name="no-code-of-its-own",
        invariant="I12",
        module="views.py",
        old="code = APPLICATION_CODES + status\n",
        new="pass\n",
        test="test_views.py::test_an_http_exception_after_the_accept",
        reason="abort(404) after the accept closes as any error does.",
    ),
    Mutation(
        name="nobody-says-goodbye",
        invariant="I12",
        module="answers.py",
        old="""        link.close(1011 if error else 1000, "")\n""",
        new="        pass\n",
        test="test_mutation_gaps.py::test_i12_what_middleware_accepts_gets_its_goodbye",
        reason="A connection that no view closes is left without a close.",
    ),
    # -- async views, and what a subscription may drop ------------------------------------------
    Mutation(
        name="async-context-ends-with-the-handshake",
        invariant="I3",
        module="views.py",
        old="    context.push()  # it stays when the WSGI call pops it\n",
        new="",
        test="test_async_views.py::test_i3_hooks_run_once_and_never_on_the_loop",
        reason="An async view's request is torn down when its handshake ends.",
    ),
    Mutation(
        name="async-view-overtakes-its-handshake",
        invariant="I3",
        module="bridge/handshake.py",
        old="                self._accepted = True\n",
        new="                self._accepted = True\n"
        "                self.link.report(self._answered, None)\n",
        test="test_async_views.py::test_i3_a_view_goes_on_when_its_handshake_has_ended",
        reason="An async view goes on while Flask is still at work on its handshake.",
    ),
    Mutation(
        name="session-saved-at-the-end",
        invariant="I3",
        module="views.py",
        old="        handshake.before_save = session.seal\n",
        new="",
        test="test_flask_extensions.py::test_a_server_side_session_is_saved_once",
        reason="A session is written once more when the view has ended, over newer data.",
    ),
    Mutation(
        name="decorators-run-async-views-elsewhere",
        invariant="I3",
        module="extension.py",
        old="        spare_async_views(app)\n",
        new="",
        test="test_flask_extensions.py"
        "::test_i3_an_async_view_below_login_required_runs_on_the_servers_loop",
        reason="A decorator that calls ensure_sync runs the view on a loop of its thread's own.",
    ),
    Mutation(
        name="async-view-not-cancelled",
        invariant="I5",
        module="running_view.py",
        old="        self._task.cancel()\n",
        new="        pass\n",
        test="test_async_views.py::test_i5_a_view_that_waits_for_something_else_is_cancelled",
        reason="An async view that awaits something else goes on when its connection has ended.",
    ),
    Mutation(
        name="abandoned-async-view-goes-on",
        invariant="I5",
        module="connection.py",
        old="            self.view.abandon()  # the server cancels us; the link is closed by now\n",
        new="",
        test="test_async_views.py::test_i5_the_server_cancels_the_connection[asyncio-sleep]",
        reason="A server that cancels a connection leaves its async view running.",
    ),
    Mutation(
        name="async-send-without-bound",
        invariant="I6",
        module="bridge/link.py",
        old="        if not self._fits(size):\n            await self._wait_for_room(size)\n",
        new="",
        test="test_async_views.py::test_i6_send_waits_while_the_outbox_is_full",
        reason="An async view fills the outbox of a peer that does not read.",
    ),
    Mutation(
        name="dropped-places-add-up",
        invariant="I6",
        module="bridge/link.py",
        old="        if self._dropped > self.config.outbox_messages:",
        new="        if False:",
        test="test_slow_consumers.py::test_i6_dropping_for_ever_takes_no_memory",
        reason="Each dropped message leaves an empty place in the outbound stream for good.",
    ),
    Mutation(
        name="droppable-messages-starve-the-view",
        invariant="I6",
        module="bridge/link.py",
        old="        if self._blocked and not freed:\n            return False\n",
        new="",
        test="test_slow_consumers.py::test_a_send_is_not_starved_by_publishes",
        reason="Messages that may be dropped keep the outbox full, and the view's send out of it.",
    ),
    Mutation(
        name="drops-not-counted",
        invariant="I6",
        module="channels.py",
        old="        setattr(self._counters, counter, getattr(self._counters, counter) + 1)\n",
        new="",
        test="test_slow_consumers.py::test_drop_oldest_keeps_the_newest",
        reason="What a subscription drops does not show in the statistics.",
    ),
    Mutation(
        name="route-without-its-limits",
        invariant="I6",
        module="views.py",
        old="            link.configure(replace(link.config, **route.limits))\n",
        new="            pass\n",
        test="test_route_limits.py::test_max_message_bytes",
        reason="A route's own limits are not kept.",
    ),
    Mutation(
        name="last-named-channel-decides",
        invariant="I7",
        module="channels.py",
        old="        for name in reversed(publication.channels):\n",
        new="        for name in publication.channels:\n",
        test="test_slow_consumers.py::test_two_named_channels_of_two_subscriptions",
        reason="Which subscription's policy holds for a publish depends on the order of looking.",
    ),
    Mutation(
        name="async-send-overtakes-threads",
        invariant="I7",
        module="bridge/link.py",
        old="            self._door.drain()  # what threads published before comes first\n",
        new="            pass\n",
        test="test_async_views.py::test_i7_what_a_thread_has_published_comes_first",
        reason="An async view's send overtakes what a thread of it published before.",
    ),
    Mutation(
        name="swallowing-view-not-left",
        invariant="I9",
        module="runtime.py",
        old="                    waiting.start_soon(view.wait)\n",
        new="                    pass\n",
        test="test_async_views.py::test_i9_a_shutdown_after_the_server_cancelled",
        reason="The runtime ends under views whose connections a server has cancelled.",
    ),
    Mutation(
        name="no-deadline-in-the-async-view",
        invariant="I11",
        module="bridge/link.py",
        old="        with anyio.move_on_after(self.config.send_timeout):\n",
        new="        with anyio.move_on_after(None):\n",
        test="test_mutation_gaps.py::test_i11_an_async_send_has_a_deadline_of_its_own",
        reason="An async view's send waits without limit for a peer that takes nothing.",
    ),
    Mutation(
        name="crossing-goodbyes-wait",
        invariant="I12",
        module="writer.py",
        old="link.over.set()  # the peer's own was first; the reader does not listen\n",
        new="pass\n",
        test="test_asgi.py::test_i12_a_goodbye_that_crosses_the_peers",
        reason="A goodbye that crosses the peer's keeps the connection's task for a send timeout.",
    ),
    # -- limits, rights and the drain: each of them, and each deadline ----------------------------
    Mutation(
        name="address-without-limit",
        invariant="limits",
        module="rights.py",
        old="and not registry.addresses.take(address_key(address), link, limit)",
        new="and not registry.addresses.take(address_key(address), link, None)",
        test="test_limits.py::test_connections_of_one_address",
        reason="One address may take every connection.",
    ),
    Mutation(
        name="user-without-limit",
        invariant="limits",
        module="rights.py",
        old="if not registry.users.take(key, link, limit, (user, app)):",
        new="if not registry.users.take(key, link, None, (user, app)):",
        test="test_limits.py::test_connections_of_one_user",
        reason="One user may take every connection.",
    ),
    Mutation(
        name="network-as-many-addresses",
        invariant="limits",
        module="bridge/registry.py",
        old="return str(ipaddress.ip_network((int(found), CUSTOMER_BITS), strict=False))",
        new="return str(found)",
        test="test_limits.py::test_networks_of_ipv6",
        reason="Who has a network of IPv6 has a new address for each connection.",
    ),
    Mutation(
        name="places-not-given-back",
        invariant="limits",
        module="bridge/registry.py",
        old="            places.give_back(key, link)\n",
        new="            pass\n",
        test="test_limits.py::test_places_come_back",
        reason="A connection that is over keeps its place.",
    ),
    Mutation(
        name="stuck-view-gives-up-its-places",
        invariant="limits",
        module="runtime.py",
        old="            else:\n                self.registry.forget(connection.link)\n",
        new="            self.registry.forget(connection.link)\n",
        test="test_limits.py::test_a_stuck_view_keeps_its_places",
        reason="Threads that are left to themselves do not count for whose they are.",
    ),
    Mutation(
        name="places-without-a-lock",
        invariant="limits",
        module="bridge/registry.py",
        old="            if limit is not None and len(place.links) >= limit:\n",
        new="            if limit is not None and len(place.links) > limit:\n",
        test="test_limits.py::test_takers_at_the_same_moment",
        reason="One more than the limit gets in.",
    ),
    Mutation(
        name="handshakes-wait-for-ever",
        invariant="limits",
        module="asgi.py",
        old="with anyio.move_on_after(timeout) as waiting:",
        new="with anyio.move_on_after(None) as waiting:",
        test="test_limits.py::test_handshakes_at_the_same_time",
        reason="A handshake waits without limit for others to get their answer.",
    ),
    Mutation(
        name="handshake-without-deadline",
        invariant="limits",
        module="connection.py",
        old="        self._alarm.set(link.config.handshake_timeout, self._time_out_handshake)\n",
        new="",
        test="test_asgi.py::test_a_handshake_that_queues_too_long",
        reason="A view that neither accepts nor refuses keeps its client waiting.",
    ),
    Mutation(
        name="message-of-any-size",
        invariant="limits",
        module="connection.py",
        old="        if size > config.max_message_bytes:\n",
        new="        if False:\n",
        test="test_asgi.py::test_i6_a_message_above_the_limit_closes_1009",
        reason="A message above the limit is delivered.",
    ),
    Mutation(
        name="messages-at-any-rate",
        invariant="limits",
        module="rate.py",
        old="            seconds = self._messages.wait(1, now)\n",
        new="            seconds = 0.0\n",
        test="test_rates.py::test_messages_a_second",
        reason="Messages come at any rate.",
    ),
    Mutation(
        name="bytes-at-any-rate",
        invariant="limits",
        module="rate.py",
        old="            seconds = self._bytes.wait(size, now)\n",
        new="            seconds = 0.0\n",
        test="test_rates.py::test_bytes_a_second",
        reason="Bytes come at any rate.",
    ),
    Mutation(
        name="bucket-without-bottom",
        invariant="limits",
        module="rate.py",
        old="min(self._size, self._tokens + (now - self._filled_at) * self._rate)",
        new="self._tokens + (now - self._filled_at) * self._rate",
        test="test_rates.py::test_a_bucket_holds_no_more_than_a_second",
        reason="Who was quiet for an hour may flood for an hour.",
    ),
    Mutation(
        name="slowed-for-ever",
        invariant="limits",
        module="connection.py",
        old="            while now + seconds <= self._pause_ends:\n",
        new="            while True:\n",
        test="test_rates.py::test_slow_down_for_too_long",
        reason="The reader pauses for longer than the server waits for a pong.",
    ),
    Mutation(
        name="slow-down-closes",
        invariant="limits",
        module="connection.py",
        old='        if config.rate_exceeded == "slow_down":\n',
        new="        if False:\n",
        test="test_rates.py::test_slow_down_loses_nothing",
        reason="Who is to be slowed down is closed.",
    ),
    Mutation(
        name="channels-without-limit",
        invariant="limits",
        module="bridge/link.py",
        old="        if len(self._levels) + len(new) > limit:\n",
        new="        if False:\n",
        test="test_limits.py::test_channels_of_one_connection",
        reason="One connection subscribes to a million channels.",
    ),
    Mutation(
        name="names-of-any-length",
        invariant="limits",
        module="extension.py",
        old="        if len(name) * 4 > limit and (size := message_bytes(name)) > limit:\n",
        new="        if False and (size := message_bytes(name)):\n",
        test="test_limits.py::test_a_channels_name",
        reason="A channel's name may be a megabyte.",
    ),
    Mutation(
        name="publishes-of-any-size",
        invariant="limits",
        module="extension.py",
        old="            _check_size(size, config.max_publish_bytes)\n",
        new="            pass\n",
        test="test_limits.py::test_a_published_message",
        reason="A published message fills every outbox.",
    ),
    Mutation(
        name="refusals-not-counted",
        invariant="limits",
        module="bridge/registry.py",
        old="            self._refused[kind] += 1\n",
        new="            pass\n",
        test="test_limits.py::test_connections_of_one_address",
        reason="What is refused is not counted.",
    ),
    Mutation(
        name="every-refusal-logged",
        invariant="limits",
        module="bridge/registry.py",
        old="            if now - self._logged_at.get(kind, -LOG_EVERY) < LOG_EVERY:\n",
        new="            if False:\n",
        test="test_limits.py::test_a_refusal_is_clear_and_logged_once",
        reason="A flood of handshakes is a flood of lines.",
    ),
    Mutation(
        name="paths-in-the-log-as-they-are",
        invariant="limits",
        module="bridge/registry.py",
        old="    return text if text.isprintable() else ascii(text)\n",
        new="    return text\n",
        test="test_limits.py::test_a_path_is_no_line_of_the_log",
        reason="A client writes lines of its own into the log.",
    ),
    Mutation(
        name="pongs-without-limit",
        invariant="limits",
        module="servers/uvicorn.py",
        old="                self.transport.pause_reading()\n",
        new="                pass\n",
        test="faults/test_frames.py::test_pings_without_an_end",
        reason="Who pings and does not read fills the memory.",
    ),
    Mutation(
        name="no-user-timeout",
        invariant="limits",
        module="servers/listen.py",
        old="socket.TCP_USER_TIMEOUT: int(user_timeout * 1000),",
        new="",
        test="faults/test_peers.py::test_nobody_reads_and_nobody_sends",
        reason="A dead peer to whom nobody sends keeps its socket.",
    ),
    Mutation(
        name="compression-by-default",
        invariant="limits",
        module="servers/serve.py",
        old="ws_per_message_deflate=options.compression",
        new="ws_per_message_deflate=True",
        test="faults/test_frames.py::test_a_bomb",
        reason="A bomb unpacks.",
    ),
    Mutation(
        name="any-page-of-any-age",
        invariant="rights",
        module="connection.py",
        old="            self._alarm.set(self.link.entry.max_age, self._expire)\n",
        new="            pass\n",
        test="test_rights.py::test_max_age",
        reason="An old login keeps its connections.",
    ),
    Mutation(
        name="logged-out-and-still-told",
        invariant="rights",
        module="bridge/link.py",
        old="        for left, size in self._drop_outbox():\n            if isinstance",
        new="        for left, size in ():\n            if isinstance",
        test="test_rights.py::test_what_waits_is_dropped",
        reason="Who is logged out still gets what waited.",
    ),
    Mutation(
        name="accept-dropped",
        invariant="rights",
        module="bridge/link.py",
        old='if isinstance(left, dict) and left["type"] == "websocket.accept":',
        new="if False:",
        test="test_rights.py::test_an_accept_that_is_not_sent_yet",
        reason="An end that comes with the accept is a refusal without an answer.",
    ),
    Mutation(
        name="handshakes-slip-through",
        invariant="rights",
        module="runtime.py",
        old="            if link.expel(code, reason, refusal):\n",
        new="            if link.expel(code, reason):\n",
        test="test_rights.py::test_a_handshake_is_answered_401",
        reason="A handshake of a user who is being logged out comes in.",
    ),
    Mutation(
        name="asked-before-the-logout",
        invariant="rights",
        module="rights.py",
        old="            if key in evicted:\n",
        new="            if False:\n",
        test="test_rights.py::test_a_handshake_that_is_about_to_be_identified",
        reason="A handshake that asked before the logout comes in after it.",
    ),
    Mutation(
        name="lock-that-a-signal-handler-meets",
        invariant="limits",
        module="bridge/registry.py",
        old="self._lock = threading.RLock()  # as that of Places",
        new="self._lock = threading.Lock()",
        test="faults/test_processes.py::test_a_signal_handler_that_interrupts_the_count",
        reason="A signal handler that publishes waits for what it interrupts.",
    ),
    Mutation(
        name="logged-out-twice",
        invariant="rights",
        module="bridge/registry.py",
        old="if link.state in (State.CONNECTING, State.OPEN))",
        new="if True)",
        test="test_rights.py::test_connections_that_are_over_do_not_count",
        reason="disconnect counts connections that are over.",
    ),
    Mutation(
        name="fragments-without-limit",
        invariant="limits",
        module="servers/uvicorn.py",
        old="if len(self.frames) < MAX_FRAGMENTS:",
        new="if True:",
        test="test_servers_uvicorn.py::test_fragments_are_limited",
        reason="A message of countless empty fragments fills the memory.",
    ),
    Mutation(
        name="recheck-without-effect",
        invariant="rights",
        module="rights.py",
        old="            if not may_stay:\n",
        new="            if False:\n",
        test="test_rights.py::test_who_may_not_stay",
        reason="Who may not stay stays.",
    ),
    Mutation(
        name="recheck-fails-closed",
        invariant="rights",
        module="rights.py",
        old="                continue\n            if not may_stay:\n",
        new="                may_stay = False\n            if not may_stay:\n",
        test="test_rights.py::test_a_database_that_is_away",
        reason="A database that is away throws everybody out.",
    ),
    Mutation(
        name="recheck-outlives-its-server",
        invariant="rights",
        module="extension.py",
        old="                self._rounds.stop()\n",
        new="                pass\n",
        test="test_rights.py::test_it_does_not_end_with_the_next_round_only",
        reason="The thread of the rechecks goes on without a server.",
    ),
    Mutation(
        name="handshakes-under-way-come-in",
        invariant="drain",
        module="runtime.py",
        old="dismiss(*GOODBYE, refusal)\n            if announce",
        new="entry\n            if announce",
        test="test_drain_api.py::test_handshakes_are_refused_from_the_first_moment",
        reason="A handshake that is under way comes in during the drain.",
    ),
    Mutation(
        name="nobody-says-why",
        invariant="drain",
        module="runtime.py",
        old="                await self._announce(announce, timeout / 4)\n",
        new="                pass\n",
        test="test_drain_api.py::test_a_receiver_may_say_goodbye",
        reason="The application cannot say goodbye.",
    ),
    Mutation(
        name="a-goodbye-without-end",
        invariant="drain",
        module="runtime.py",
        old="                await self._announce(announce, timeout / 4)\n",
        new="                await self._announce(announce, math.inf)\n",
        test="test_drain_api.py::test_a_receiver_that_hangs_delays_by_a_quarter",
        reason="A receiver that hangs keeps the server.",
    ),
    Mutation(
        name="busy-views-are-cut-off",
        invariant="drain",
        module="runtime.py",
        old="connection.link.let_finish(*GOODBYE, refusal)",
        new="connection.link.dismiss(*GOODBYE, refusal)",
        test="test_drain_api.py::test_a_busy_view_may_finish",
        reason="A view in the middle of a message cannot answer it.",
    ),
    Mutation(
        name="busy-views-stay",
        invariant="drain",
        module="runtime.py",
        old="        await self._dismiss_all(start + timeout / 2)\n",
        new="        await self._dismiss_all(start + timeout)\n",
        test="test_drain_api.py::test_a_busy_view_is_not_closed_before_half_the_time",
        reason="A view that never waits is closed when everything is cut.",
    ),
    Mutation(
        name="all-at-once",
        invariant="drain",
        module="runtime.py",
        old="            size = max(BATCH, math.ceil(",
        new="            size = len(waiting) + max(BATCH, math.ceil(",
        test="test_drain_api.py::test_the_batches",
        reason="All clients come back in the same moment.",
    ),
    Mutation(
        name="always-the-same-first",
        invariant="drain",
        module="runtime.py",
        old="        random.shuffle(waiting)\n",
        new="",
        test="test_drain_api.py::test_the_batches",
        reason="The order is not random.",
    ),
    Mutation(
        name="stuck-views-not-named",
        invariant="drain",
        module="runtime.py",
        old='        report(views, "at the end of the drain (WEBSOCKETS_DRAIN_TIMEOUT)")\n',
        new="        pass\n",
        test="test_drain_api.py::test_stuck_views_are_logged_with_their_stacks",
        reason="A view that did not return is not named.",
    ),
    Mutation(
        name="finished-views-say-nothing",
        invariant="drain",
        module="bridge/link.py",
        old="            self.close(*self._dismissal)\n",
        new="            pass\n",
        test="test_drain_api.py::test_a_busy_view_may_finish",
        reason="A view that has finished is closed with another code, or late.",
    ),
    # -- the fast paths: faster, and nothing else --------------------------------------------------
    Mutation(
        name="a-thread-that-does-not-wait-ends-the-relay",
        invariant="fast",
        module="bridge/handover.py",
        old="        return self._is_awaited\n",
        new="        return True\n",
        test="test_handover.py::test_whoever_does_not_wait_is_passed_over",
        reason="Threads sleep on what they were given, because one before them gave up.",
    ),
    Mutation(
        name="a-thread-that-gives-up-ends-the-relay",
        invariant="fast",
        module="bridge/handover.py",
        old="        finally:\n            self._is_awaited = False",
        new="        except BaseException:\n            raise\n        else:\n"
        "            self._is_awaited = False",
        test="test_handover.py::test_whoever_waited_too_long_passes_on",
        reason="Threads sleep on what they were given, because one before them was too late.",
    ),
    Mutation(
        name="the-loop-does-not-start-the-relay-again",
        invariant="fast",
        module="bridge/handover.py",
        old="        if len(self._line) == 1:\n            self._at_turn_end()\n",
        new="        if len(self._line) == 1 and not hasattr(self, 'asked'):\n"
        "            self.asked = True\n            self._at_turn_end()\n",
        test="test_handover.py::test_the_loop_is_asked_while_nobody_is_on_the_way",
        reason="The first line is woken, and no other.",
    ),
    Mutation(
        name="own-compressor-goes-on",
        invariant="fast",
        module="servers/frames.py",
        old="                self._forget()\n",
        new="                pass\n",
        test="test_servers_frames.py::test_every_client_can_read_it",
        reason="A connection's own message refers to what its client does not have.",
    ),
    Mutation(
        name="everybody-gets-the-same-frame",
        invariant="fast",
        module="servers/frames.py",
        old="            data = message.frames.get(self._deflate)\n",
        new="            data = next(iter(message.frames.values()), None)\n",
        test="test_servers_frames.py::test_made_once",
        reason="One who has no window gets what was compressed for another.",
    ),
    Mutation(
        name="frames-after-the-goodbye",
        invariant="fast",
        module="servers/frames.py",
        old="self.is_paused or self._transport.is_closing()",
        new="self.is_paused",
        test="test_servers_frames.py::test_uvicorns_goodbyes_close_the_transport",
        reason="A frame is written behind the close frame.",
    ),
    Mutation(
        name="frames-for-who-does-not-read",
        invariant="fast",
        module="servers/frames.py",
        old="                self.frame_writer.is_paused = True\n",
        new="                pass\n",
        test="test_servers_frames.py::test_left_to_uvicorn",
        reason="The transport of a slow peer is written to without limit.",
    ),
    Mutation(
        name="messages-overtake-the-reader",
        invariant="fast",
        module="connection.py",
        old="                self._idle = False\n",
        new="",
        test="test_servers_frames.py::test_nothing_overtakes_what_the_reader_holds",
        reason="A message passes one that waits for room in the reader's hands.",
    ),
    Mutation(
        name="messages-overtake-the-queue",
        invariant="fast",
        module="servers/frames.py",
        old="self.read_paused or self.close_sent or not self.queue.empty()",
        new="self.close_sent",
        test="test_servers_frames.py::test_what_is_not_taken_is_received",
        reason="A message passes one that waits in uvicorn's queue.",
    ),
    Mutation(
        name="taken-past-the-limits",
        invariant="fast",
        module="connection.py",
        old="self._idle and self.link.config.passes(size) and",
        new="self._idle and",
        test="faults/test_limits_served.py::test_rates",
        reason="A message that is taken where it comes is not counted for the rate.",
    ),
    Mutation(
        name="writer-kept-in-a-circle",
        invariant="fast",
        module="connection.py",
        old="        writer = Writer(self, self._send)  # not kept: it has the connection\n",
        new="        writer = self._writer = Writer(self, self._send)\n",
        test="test_idle.py::test_a_connection_leaves_no_circle",
        reason="Each connection waits for the collector, with all that it had.",
    ),
    Mutation(
        name="stream-for-an-idle-connection",
        invariant="fast",
        module="writer.py",
        old="        while (item := link.next_outbound()) is not None:\n",
        new="        while True:\n"
        "            if (item := link.next_outbound()) is None:\n"
        "                await anyio.sleep(0.01)\n"
        "                continue\n",
        test="test_idle.py::test_an_idle_connection_has_one_task",
        reason="A writer stays while nothing is to be written.",
    ),
    Mutation(
        name="fast-paths-for-ever",
        invariant="fast",
        module="writer.py",
        old=" or not link.config.fast_paths:",
        new=":",
        test="test_servers_frames.py::test_switched",
        reason="WEBSOCKETS_FAST_PATHS does not switch them off.",
    ),
    Mutation(
        name="responses-that-nobody-hears-of",
        invariant="fast",
        module="servers/responses.py",
        old="    exchange.on_response()\n",
        new="",
        test="test_servers_responses.py::test_the_same_bytes_and_the_same_state",
        reason="A second request on the connection is never begun.",
    ),
    Mutation(
        name="control-characters-in-a-header",
        invariant="fast",
        module="servers/responses.py",
        old="        if _CONTROL.search(value):\n            return False\n",
        new="",
        test="test_servers_responses.py::test_left_to_uvicorn",
        reason="A value passes that uvicorn lets nobody send.",
    ),
    Mutation(
        name="a-busy-pool-holds-up-the-relay",
        invariant="fast",
        module="bridge/threads.py",
        old="            return self._busy <= self._threads\n",
        new="            return True\n",
        test="test_threads.py::TestRelay::test_without_a_free_thread_the_relay_goes_on",
        reason="Views sleep on their messages while every HTTP thread is in a slow view.",
    ),
    Mutation(
        name="http-threads-pass-on-too-late",
        invariant="fast",
        module="bridge/threads.py",
        old="            self._relay.pass_on()\n            run = self._work.popleft()\n",
        new="            run = self._work.popleft()\n",
        test="test_threads.py::TestRelay::test_each_passes_on_before_it_works",
        reason="The third of several slow requests waits for the first.",
    ),
    Mutation(
        name="large-responses-without-deadlines",
        invariant="fast",
        module="http.py",
        old="        if len(chunk) > Pipe.PIECE_BYTES:\n            return\n",
        new="",
        test="test_http_inline.py::test_a_large_response",
        reason="A large response goes to the transport in one piece.",
    ),
    Mutation(
        name="garbage-waits-for-ever",
        invariant="fast",
        module="runtime.py",
        old="            self.connections.discard(connection)\n            if tunes:\n",
        new="            self.connections.discard(connection)\n            if False:\n",
        test="test_tuning.py::test_each_connection_counts",
        reason="A crowd that has left leaves the collector lazy.",
    ),
    Mutation(
        name="tuned-for-ever",
        invariant="fast",
        module="asgi.py",
        old="if self._config.tune_process:",
        new="if True:",
        test="test_tuning.py::test_switched_off_nothing_is_asked_for",
        reason="WEBSOCKETS_TUNE_PROCESS does not switch it off.",
    ),
    Mutation(
        name="who-has-closed-is-closed-again",
        invariant="limits",
        module="connection.py",
        old="            return False  # its view has closed meanwhile\n",
        new="            pass\n",
        test="test_link.py::test_who_has_closed_already_is_not_closed_for_a_limit",
        reason="A limit is counted that has closed nobody.",
    ),
)


# -- the pytest plugin: -p tests.mutations --------------------------------------------------------


def pytest_configure() -> None:
    """Make sure that what is tested is the copy."""
    import flask_websockets

    found, expected = Path(flask_websockets.__file__).parent, Path(os.environ[COPY])
    if found != expected:
        raise pytest.UsageError(f"Expected to import {expected}; got {found}.")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A fixture that fails is no red test: it has not come to what it tests."""
    if report.when == "setup" and report.failed:
        pytest.exit(f"The setup of {report.nodeid} failed:\n{report.longreprtext}", 3)


# -- the runs ---------------------------------------------------------------------------------


def run(tests: Iterable[str], mutation: Mutation | None = None) -> tuple[int | None, str]:
    """Run tests against a copy of the package.

    :returns: pytest's exit code, None if it did not end in time; and what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="flask-websockets-") as name:
        directory = Path(name).resolve()
        copy = directory / PACKAGE.name
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            path = copy / mutation.module
            path.write_text(mutation.mutate(path.read_text()))
        python_path = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            COPY: str(copy),
            "PYTHONPATH": os.pathsep.join(python_path),
        }
        command = [sys.executable, "-m", "pytest", "-p", "tests.mutations"]
        command += ["-q", "-x", "-p", "no:cacheprovider"]
        # The thread method ends the process on the spot: a mutated one may not end by itself.
        command += ["--timeout", str(TEST_TIMEOUT), "--timeout-method", "thread"]
        command += [f"tests/{test}" for test in tests]
        output = directory / "output.txt"
        with output.open("wb") as stream:
            code = _run_group(command, environment, stream.fileno())
        return code, output.read_text(errors="replace")


def _run_group(command: Sequence[str], environment: dict[str, str], output: int) -> int | None:
    """Run a command to its end, and leave none of the servers that it has started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(RUN_TIMEOUT)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def try_out(mutation: Mutation) -> tuple[int | None, str, float]:
    """Run a mutation's test against it: the exit code, what was printed, and the seconds."""
    started = time.monotonic()
    return *run([mutation.test], mutation), time.monotonic() - started


def verdict(code: int | None) -> str:
    """What a run's exit code says of its mutation."""
    if code == pytest.ExitCode.OK:
        return "SURVIVED"
    return "red" if code == pytest.ExitCode.TESTS_FAILED else "ERROR"


def selected(names: Sequence[str]) -> list[Mutation]:
    """The mutations with these names or of these invariants; all of them without any."""
    known = {mutation.name for mutation in MUTATIONS} | {each.invariant for each in MUTATIONS}
    if unknown := set(names) - known:
        raise SystemExit(f"No such mutation: {', '.join(sorted(unknown))}")
    return [each for each in MUTATIONS if not names or {each.name, each.invariant} & set(names)]


def main(names: Sequence[str]) -> int:
    mutations = selected(names)
    tests = list(dict.fromkeys(mutation.test for mutation in mutations))
    started = time.monotonic()
    code, output = run(tests)
    if code != pytest.ExitCode.OK:
        print(f"{output}\nThe tests are not green without a mutation.")
        return 1
    print(f"{len(tests)} tests are green without a mutation, {time.monotonic() - started:.1f} s\n")
    width = max(len(mutation.name) for mutation in mutations)
    print(f"{'mutation':<{width}}  invariant  result    seconds")
    verdicts = []
    with ThreadPoolExecutor(JOBS) as pool:
        for mutation, (code, output, seconds) in zip(
            mutations, pool.map(try_out, mutations), strict=True
        ):
            result = verdict(code)
            verdicts.append(result)
            line = f"{mutation.name:<{width}}  {mutation.invariant:<9}  {result:<8}  {seconds:7.1f}"
            print(line, flush=True)
            if result != "red":
                print(f"\n{output}\n{mutation.test} does not see: {mutation.reason}\n", flush=True)
    red = verdicts.count("red")
    print(f"\n{red} of {len(verdicts)} mutations are red, {time.monotonic() - started:.0f} s")
    return 0 if red == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
