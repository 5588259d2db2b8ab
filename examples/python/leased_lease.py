"""One lease, and the time contract that its holder keeps.

A holder must stop before the daemon may let another holder in. So the holder computes its deadline
by its own clock, and on the early side:

    deadline = sent_at + remaining - margin

After a grant without `waited`, `remaining` is the TTL.
`sent_at` is read just before a request is sent, and is used once the daemon has confirmed that
request. The time of the answer is not used, since the answer may have been delayed. For the same
reason a holder does not rely on a grant from the queue (`waited`) before a touch is confirmed.

No lease can stop a process that is paused in the middle of its work: send `lease.token` with every
write.
"""

import threading
import time
import uuid

import grpc
from google.protobuf.duration_pb2 import Duration
from leased.v1 import lease_pb2 as pb
from leased.v1 import lease_pb2_grpc

# After these codes the outcome is unknown. The call is repeated with the same lease id.
UNKNOWN_OUTCOME = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
}

# Says, as gRPC's own retries do, that an acquire with the same id had no answer and may still
# arrive at a daemon.
UNANSWERED = (("grpc-previous-rpc-attempts", "1"),)

# Notices a dead connection and reconnects well within a TTL.
CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Calls are repeated here. gRPC's own retries would remove the header of UNANSWERED.
    ("grpc.enable_retries", 0),
]

# A clock that also counts while the machine is suspended, if the system has one.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Returns the seconds of a clock that is never set."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class Held(Exception):
    """Another client holds the key, even after the wait."""


class Lost(Exception):
    """The lease is over, or cannot be relied on."""


class Lease:
    """One acquisition of one key: `acquire`, then work until `lost` is set, then `release`.

    Safe to use from several threads. `with Lease(..) as lease` acquires and releases.
    """

    def __init__(self, channel, key, owner="", ttl=10.0, wait=0.0):
        self.key = key
        self.token = None
        self.lost = threading.Event()
        self.reason = None
        self._leased = lease_pb2_grpc.LeaseServiceStub(channel)
        self._owner, self._ttl, self._wait = owner, ttl, wait
        # Covers the drift between two clocks, and the time that stopping takes.
        self._margin = ttl / 10
        self._id = None
        self._metadata = ()
        self._deadline = None
        self._ended = threading.Event()
        self._confirmed = threading.Event()
        self._lock = threading.Lock()
        self._call = None
        self._threads = []

    def acquire(self) -> int:
        """Waits for the lease, begins to keep it alive, and returns its fencing token.

        Raises `Held` if another client holds the key for longer than `wait`, `Lost` if the lease
        was closed or lost meanwhile, and `grpc.RpcError` if a retry cannot help.
        """
        sent_at, granted = self._request_grant()
        self.token = granted.fencing_token
        if not granted.waited:
            self._believe(sent_at + granted.ttl.ToNanoseconds() / 1e9)
        self._start(self._keep_alive, self._watch)
        self._confirmed.wait()
        if self.lost.is_set():
            raise Lost(self.reason)
        return self.token

    def remaining(self) -> float:
        """Returns for how many seconds the lease may be relied on. If 0, do not act on the key."""
        with self._lock:
            believed = self._deadline is not None and not self.lost.is_set()
            return max(0.0, self._deadline - now()) if believed else 0.0

    def release(self) -> bool:
        """Releases the lease, or leaves the queue, and ends all threads of this object.

        May be called at any time, but not in a signal handler. Returns False if the lease was not
        held any more, or if no daemon answered. In the second case the next waiter waits until the
        lease expires.
        """
        self.close()
        for thread in self._threads:
            thread.join()
        give_up = now() + self._ttl
        pause = 0.1
        while self._id is not None:
            try:
                self._leased.Release(pb.ReleaseRequest(lease=self._ref()), timeout=5, metadata=self._metadata)
                return True
            except grpc.RpcError as error:
                if error.code() not in UNKNOWN_OUTCOME or now() + pause > give_up:
                    break
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        return False

    def close(self):
        """Ends the work and every wait at once, without a call to the daemon. Never blocks long."""
        self._end("closed")

    def __enter__(self):
        try:
            self.acquire()
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(self, *_):
        self.release()

    def _request_grant(self):
        """Repeats the acquire until it is answered. Requests share one id, and so one queue entry,
        unless its lease has ended."""
        give_up = now() + self._wait
        pause = 0.1
        self._id = str(uuid.uuid4())
        while not self._ended.is_set():
            wait = max(0.0, give_up - now())
            request = pb.AcquireRequest(
                key=self.key,
                lease_id=self._id,
                owner=self._owner,
                ttl=_duration(self._ttl),
                wait=_duration(wait),
            )
            metadata, self._metadata = self._metadata, UNANSWERED
            sent_at = now()
            call = self._leased.Acquire.future(request, timeout=wait + 5, metadata=metadata)
            self._cancel_when_closed(call)
            try:
                granted = call.result()
                self._metadata = metadata
                return sent_at, granted
            except grpc.FutureCancelledError:
                break
            except grpc.RpcError as error:
                if error.code() not in UNKNOWN_OUTCOME:
                    self._metadata = metadata
                if error.code() == grpc.StatusCode.ALREADY_EXISTS:
                    raise Held(error.details()) from None
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    # An earlier request was granted, and its lease has ended: use a new id.
                    self._id, self._metadata = str(uuid.uuid4()), ()
                elif error.code() not in UNKNOWN_OUTCOME or now() > give_up + self._ttl:
                    raise
            self._ended.wait(pause)
            pause = min(2 * pause, 1.0)
        raise Lost("closed")

    def _keep_alive(self):
        """Opens one keepalive stream after the other, until the lease ends."""
        while not self._ended.is_set():
            sent, over = {}, threading.Event()
            call = self._leased.KeepAlive(self._messages(sent, over))
            self._cancel_when_closed(call)
            try:
                for answer in call:
                    sent_at = sent.pop(answer.sequence, None)
                    for result in answer.results:
                        self._receive(result, sent_at)
            except grpc.RpcError:
                pass
            over.set()
            self._ended.wait(min(0.5, self._ttl / 20))

    def _messages(self, sent, over):
        """Yields a stream's messages, on a thread of gRPC's. Ends at once when `over` is set."""
        sequence = 0
        while not sent:
            sequence += 1
            sent[sequence] = now()
            yield pb.KeepAliveRequest(leases=[self._ref()], sequence=sequence)
            if over.wait(self._ttl / 3):
                return
        # The last message has no answer. This stream may be silently dead, and a new one may work.
        self._call.cancel()

    def _receive(self, result, sent_at):
        if result.HasField("lost"):
            self._end(pb.LossReason.Name(result.lost.reason).removeprefix("LOSS_REASON_").lower())
        elif result.HasField("kept") and sent_at is not None:
            self._believe(sent_at + result.kept.remaining.ToNanoseconds() / 1e9)

    def _watch(self):
        """Sets `lost` at the deadline, whatever the network does."""
        confirm_by = now() + self._ttl
        while not self._ended.is_set():
            with self._lock:
                left = (self._deadline or confirm_by) - now()
            if left <= 0:
                self._end("no answer from a daemon in time")
            # At most 1 s: a sleep may be counted by a clock that stands still during a suspension.
            self._ended.wait(min(left, 1.0))

    def _believe(self, until):
        with self._lock:
            self._deadline = max(self._deadline or 0.0, until - self._margin)
        if self.remaining() > 0:
            self._confirmed.set()

    def _end(self, reason):
        with self._lock:
            first, self.reason = self.reason is None, self.reason or reason
            call = self._call
        if first:
            self.lost.set()
            self._ended.set()
            self._confirmed.set()
            if call is not None:
                call.cancel()

    def _cancel_when_closed(self, call):
        with self._lock:
            self._call = call
        # The lease may have been closed before `_call` was set.
        if self._ended.is_set():
            call.cancel()

    def _start(self, *bodies):
        self._threads = [threading.Thread(target=body, daemon=True) for body in bodies]
        for thread in self._threads:
            thread.start()

    def _ref(self):
        return pb.LeaseRef(key=self.key, lease_id=self._id)


def _duration(seconds):
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
