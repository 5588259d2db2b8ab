"""The calls of mongolock on a leased daemon: `MongoLock` with its signatures, but other guarantees.

A lease id that the object keeps secret decides who holds a lock, not the owner's name. The daemon's
store decides when a lock expires, not this machine's clock. Threads may share an object. After a
fork each process needs its own.
"""

import contextlib
import datetime
import json
import math
import threading
import time
import uuid

import grpc
from google.protobuf.duration_pb2 import Duration
from leased.v1 import lease_pb2 as pb
from leased.v1 import lease_pb2_grpc

# A lock without `expire` is touched while this process runs, and expires this many seconds after
# the last touch.
UNLIMITED_TTL = 30.0
# What a daemon accepts by default.
SHORTEST_TTL, LONGEST_TTL = 0.1, 24 * 3600.0
LONGEST_WAIT = 3600.0
# How long a call may take beyond its wait.
PATIENCE = 10.0

# Where a daemon listens by default.
PORT = 5327
# mongolock's own defaults, for whichever of `db` and `collection` is left out.
DB, COLLECTION = "mongolock", "lock"

# Notices a silently dead connection within 8 s, and replaces it before a call gives up.
# gRPC's core reads the timeout of a ping from the second option or the third, depending on its
# version.
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
]

# Retries are safe: a call with the same lease id is the same acquisition.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": "leased.v1.LeaseService", "method": method}
                for method in ("Acquire", "Release", "Touch", "Get")
            ],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

# Says with a release that its acquire had no answer and may still arrive at the daemon.
_UNANSWERED = (("grpc-previous-rpc-attempts", "1"),)

_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


def _now():
    """Returns the seconds of a clock that is never set, and counts suspended time if it can."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class MongoLockException(Exception):
    """The lock is not held, so it cannot be touched."""


class MongoLockLocked(Exception):
    """Another client holds the lock, even after the timeout."""


class _Lock:
    """One lease of a `MongoLock`."""

    def __init__(self, expire):
        self.id, self.expire = str(uuid.uuid4()), expire
        self.ttl = min(max(expire, SHORTEST_TTL), LONGEST_TTL) if expire else UNLIMITED_TTL
        # Until when the background thread touches the lease; -inf: never.
        self.touch_until = -math.inf if expire else math.inf
        self.touched = -math.inf


class MongoLock:
    """Locks at the daemon at `host`, an address like `localhost:5327`, or at that of `channel`.

    If `db` or `collection` is given, keys begin with `db/collection/`, apart from other keys.
    `acquire_retry_step` is ignored, since nothing polls. A pymongo `client` is refused, since it
    reaches no daemon.
    """

    def __init__(self, host="localhost", db=None, collection=None, client=None, acquire_retry_step=None, *, channel=None):
        del acquire_retry_step
        if client is not None or not isinstance(collection, (str, type(None))):
            raise TypeError(
                "leased_mongolock keeps its locks in a leased daemon, and not in MongoDB: leave out `client`, give the "
                "daemon's address as `host`, and give `db` and `collection` as strings"
            )
        if "://" in host:
            raise ValueError(f"`host` is the address of a leased daemon, like localhost:{PORT}, and not a URI")
        self._prefix = "" if db is None and collection is None else f"{db or DB}/{collection or COLLECTION}/"
        options = [
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            *_KEEPALIVE,
        ]
        self._channel = channel or grpc.insecure_channel(_with_port(host), options=options)
        self._leased = lease_pb2_grpc.LeaseServiceStub(self._channel)
        # This channel has no retries: those of grpcio would remove the header of _UNANSWERED from a
        # first attempt. The channel connects when it is used.
        plain = channel or grpc.insecure_channel(_with_port(host), options=[("grpc.enable_retries", 0), *_KEEPALIVE])
        self._without_retries = lease_pb2_grpc.LeaseServiceStub(plain)
        self._held = {}
        self._changed = threading.Condition()
        self._toucher = None

    @contextlib.contextmanager
    def __call__(self, key, owner, timeout=None, expire=None):
        """Holds the lock for a `with` block. Raises `MongoLockLocked` if `lock` returns False."""
        if not self.lock(key, owner, timeout, expire):
            info = self.get_lock_info(key) or {"owner": None, "created": None, "expire": None}
            raise MongoLockLocked(f"{key} is locked by {info['owner']} since {info['created']}, until {info['expire']}")
        try:
            yield
        finally:
            self.release(key, owner)

    def lock(self, key, owner, timeout=None, expire=None):
        """Acquires the lock and returns True, or False if it is still held after `timeout` seconds.

        The lock is free again `expire` seconds after the grant or the last touch. Without `expire`,
        it is free again when this process releases it, or `UNLIMITED_TTL` seconds after the last
        touch of a process that has ended.
        """
        lock = _Lock(expire)
        give_up = _now() + (timeout or 0)
        while True:
            wait = min(max(0.0, give_up - _now()), LONGEST_WAIT)
            if self._acquire(key, owner, lock, wait):
                break
            if _now() >= give_up:
                return False
        with self._changed:
            self._held[key, owner] = lock
            self._wake()
        return True

    def release(self, key, owner):
        """Releases the lock if this object holds it for this owner. Otherwise does nothing."""
        with self._changed:
            lock = self._held.pop((key, owner), None)
        if lock is not None:
            with _losses():
                self._leased.Release(pb.ReleaseRequest(lease=self._ref(key, lock)), timeout=PATIENCE)

    def touch(self, key, owner, expire=None):
        """Makes the lock last at least `expire` seconds from now, or its original duration.

        Raises `MongoLockException` if the lock is not held. A lock without expiry needs no touch.
        """
        with self._changed:
            lock = self._held.get((key, owner))
        if lock is None:
            raise MongoLockException(f"{owner} does not hold {key}")
        sent_at = _now()
        if not self._touch(key, owner, lock):
            raise MongoLockException(f"{owner} does not hold {key} any more")
        if lock.expire:
            with self._changed:
                # A touch lasts for the TTL of the grant, so a longer `expire` takes several.
                lock.touch_until = sent_at + (expire or lock.expire) - lock.ttl
                self._wake()

    def get_lock_info(self, key):
        """Returns the lock as a dictionary, or None if there never was one.

        Times are naive UTC, by the store's clock. A lock without `expire` shows when it would
        expire without further touches.
        """
        try:
            seen = self._leased.Get(pb.GetRequest(key=self._prefix + key), timeout=PATIENCE).lease
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return None
            raise
        info = {"_id": key, "locked": bool(seen.holders), "owner": None, "created": None, "expire": None}
        if seen.holders:
            holder = seen.holders[0]
            info["owner"] = holder.owner
            info["created"] = holder.acquire_time.ToDatetime()
            info["expire"] = holder.expire_time.ToDatetime()
        return info

    def is_locked(self, key):
        """Returns whether the lock is held and has not expired."""
        try:
            seen = self._leased.Get(pb.GetRequest(key=self._prefix + key), timeout=PATIENCE).lease
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return seen.state == pb.LEASE_STATE_HELD

    def fencing_token(self, key, owner):
        """Returns the token to send with every write, or None if this object has no such lock.

        mongolock has no such method.
        """
        with self._changed:
            lock = self._held.get((key, owner))
        return lock and lock.token

    def _acquire(self, key, owner, lock, wait):
        request = pb.AcquireRequest(
            key=self._prefix + key, lease_id=lock.id, owner=owner, ttl=_duration(lock.ttl), wait=_duration(wait)
        )
        lock.touched = _now()
        try:
            try:
                granted = self._leased.Acquire(request, timeout=wait + PATIENCE)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.ALREADY_EXISTS:
                    return False
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    # An earlier attempt was granted, and its lease has ended: use a new id.
                    lock.id = str(uuid.uuid4())
                    return False
                raise
            lock.token = granted.fencing_token
            # A grant from the queue may be old when its answer arrives.
            if granted.waited and not self._touch(key, owner, lock):
                lock.id = str(uuid.uuid4())
                return False
            return True
        except BaseException:
            # The lease may have been granted, and the caller will not use it. If this release
            # fails, the lease expires after its TTL.
            with contextlib.suppress(grpc.RpcError):
                request = pb.ReleaseRequest(lease=self._ref(key, lock))
                self._without_retries.Release(request, timeout=PATIENCE, metadata=_UNANSWERED)
            raise

    def _touch(self, key, owner, lock, timeout=PATIENCE):
        """Touches the lock. If it is lost, forgets it and returns False."""
        sent_at = _now()
        with _losses() as lost:
            self._leased.Touch(pb.TouchRequest(lease=self._ref(key, lock)), timeout=timeout)
            lock.touched = sent_at
        if lost:
            with self._changed:
                if self._held.get((key, owner)) is lock:
                    del self._held[key, owner]
        return not lost

    def _ref(self, key, lock):
        return pb.LeaseRef(key=self._prefix + key, lease_id=lock.id)

    def _wake(self):
        """Wakes the touching thread, and starts it when a lock first needs touches."""
        if self._toucher is None and any(lock.touch_until > _now() for lock in self._held.values()):
            self._toucher = threading.Thread(target=self._touch_on, daemon=True)
            self._toucher.start()
        self._changed.notify()

    def _touch_on(self):
        while True:
            with self._changed:
                held = [(*named, lock) for named, lock in self._held.items() if lock.touch_until > lock.touched]
                due = min((lock.touched + lock.ttl / 3 for *_, lock in held), default=math.inf) - _now()
                if due > 0:
                    self._changed.wait(min(due, 60.0))
                    continue
            pause = 0.01
            for key, owner, lock in held:
                if lock.touched + lock.ttl / 3 <= _now():
                    try:
                        self._touch(key, owner, lock, min(PATIENCE, lock.ttl / 3))
                    except grpc.RpcError:
                        # No daemon answers. The lock lasts for the rest of its TTL.
                        pause = min(0.5, lock.ttl / 10)
            time.sleep(pause)


@contextlib.contextmanager
def _losses():
    """Yields a list, and adds an element to it if the daemon answers that the lease is lost."""
    lost = []
    try:
        yield lost
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
        lost.append(error)


def _with_port(host):
    """Adds the daemon's default port to an address without a port; gRPC would use 443."""
    name, _, port = host.rpartition(":")
    if port.isdigit() and (":" not in name or name.endswith("]")):
        return host
    return f"[{host}]:{PORT}" if ":" in host and not host.endswith("]") else f"{host}:{PORT}"


def _duration(seconds):
    duration = Duration()
    duration.FromTimedelta(datetime.timedelta(seconds=seconds))
    return duration
