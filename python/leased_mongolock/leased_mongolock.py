"""The calls of mongolock 1.3.4 on a leased daemon: `MongoLock`, with other promises behind the same signatures.

Who holds a lock is decided by a lease id that the object keeps to itself, never by the owner's name, and when a lock is
over is decided by the daemon's store, never by a clock of this machine. One object may be shared by threads; after a
fork each process needs one of its own.
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

# A lock without `expire` is touched for as long as this process lives, and is over this many seconds after it ended.
UNLIMITED_TTL = 30.0
# What a daemon takes, unless it is told otherwise.
SHORTEST_TTL, LONGEST_TTL = 0.1, 24 * 3600.0
LONGEST_WAIT = 3600.0
# How long a call may take beyond its wait.
PATIENCE = 10.0

# Repeats are safe: a call with the same lease id is the same acquisition.
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

_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


def _now():
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps where there is such a clock."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class MongoLockException(Exception):
    """A lock that is not held cannot be touched."""


class MongoLockLocked(Exception):
    """Another holds the lock, also after the timeout."""


class _Lock:
    """A lease of this object."""

    def __init__(self, ttl, expires):
        self.id, self.ttl, self.expires = str(uuid.uuid4()), ttl, expires
        # Until when this object touches it unasked; -inf: never.
        self.touch_until = -math.inf if expires else math.inf
        self.touched = -math.inf


class MongoLock:
    """Locks at the daemon at `endpoint`, or at the one that `channel` leads to."""

    def __init__(self, endpoint="localhost:5327", channel=None):
        options = [
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        ]
        self._channel = channel or grpc.insecure_channel(endpoint, options=options)
        self._leased = lease_pb2_grpc.LeaseServiceStub(self._channel)
        self._held = {}
        self._changed = threading.Condition()
        self._toucher = None

    @contextlib.contextmanager
    def __call__(self, key, owner, timeout=None, expire=None):
        """Locks for the length of a `with` block. Raises `MongoLockLocked` if `lock` returns False."""
        if not self.lock(key, owner, timeout, expire):
            info = self.get_lock_info(key) or {"owner": None, "created": None, "expire": None}
            raise MongoLockLocked(f"{key} is locked by {info['owner']} since {info['created']}, until {info['expire']}")
        try:
            yield
        finally:
            self.release(key, owner)

    def lock(self, key, owner, timeout=None, expire=None):
        """Takes the lock and returns True, or False if another still holds it after `timeout` seconds. It is free again
        `expire` seconds after the grant or the last touch; without `expire`, when this process releases it or ends.
        """
        lock = _Lock(min(max(expire, SHORTEST_TTL), LONGEST_TTL) if expire else UNLIMITED_TTL, bool(expire))
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
        """Gives the lock back, if this object holds it for this owner; else nothing happens."""
        with self._changed:
            lock = self._held.pop((key, owner), None)
        if lock is not None:
            with _losses():
                self._leased.Release(pb.ReleaseRequest(lease=_ref(key, lock)), timeout=PATIENCE)

    def touch(self, key, owner, expire=None):
        """Has the lock last at least `expire` seconds from now on. Raises `MongoLockException` if it is not held, or if
        it has an expiry and none is given; a lock without expiry needs no touch."""
        with self._changed:
            lock = self._held.get((key, owner))
        if lock is None:
            raise MongoLockException(f"{owner} does not hold {key}")
        if lock.expires and not expire:
            raise MongoLockException(f"{key} was locked with an expiry: touch it with one")
        sent_at = _now()
        if not self._touch(key, owner, lock):
            raise MongoLockException(f"{owner} does not hold {key} any more")
        if lock.expires:
            with self._changed:
                # A touch lasts for the TTL of the grant, so a longer one takes several.
                lock.touch_until = sent_at + expire - lock.ttl
                self._wake()

    def get_lock_info(self, key):
        """The lock as a dictionary, or None if there never was one. Times are naive UTC, as the store tells them; a
        lock without `expire` shows when it would be over if its process ended now."""
        try:
            seen = self._leased.Get(pb.GetRequest(key=key), timeout=PATIENCE).lease
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
        """Whether somebody holds the lock in time."""
        try:
            seen = self._leased.Get(pb.GetRequest(key=key), timeout=PATIENCE).lease
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return seen.state == pb.LEASE_STATE_HELD

    def fencing_token(self, key, owner):
        """The token to send with every write, which mongolock did not have; None if this object holds no such lock."""
        with self._changed:
            lock = self._held.get((key, owner))
        return lock and lock.token

    def _acquire(self, key, owner, lock, wait):
        request = pb.AcquireRequest(
            key=key, lease_id=lock.id, owner=owner, ttl=_duration(lock.ttl), wait=_duration(wait)
        )
        lock.touched = _now()
        try:
            granted = self._leased.Acquire(request, timeout=wait + PATIENCE)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.ALREADY_EXISTS:
                return False
            if error.code() == grpc.StatusCode.NOT_FOUND:
                # Granted, the answer got lost, and another took the key when its time was over.
                lock.id = str(uuid.uuid4())
                return False
            # It may have been granted all the same. If that cannot be mended now, its time runs out.
            with contextlib.suppress(grpc.RpcError):
                self._leased.Release(pb.ReleaseRequest(lease=_ref(key, lock)), timeout=PATIENCE)
            raise
        lock.token = granted.fencing_token
        # A grant from the line may be old by now.
        if granted.waited and not self._touch(key, owner, lock):
            lock.id = str(uuid.uuid4())
            return False
        return True

    def _touch(self, key, owner, lock, timeout=PATIENCE):
        """False if the lock is lost, which is then forgotten."""
        sent_at = _now()
        with _losses() as lost:
            self._leased.Touch(pb.TouchRequest(lease=_ref(key, lock)), timeout=timeout)
            lock.touched = sent_at
        if lost:
            with self._changed:
                if self._held.get((key, owner)) is lock:
                    del self._held[key, owner]
        return not lost

    def _wake(self):
        """Has the thread that touches look at what is held; there is none before one is needed."""
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
                        # The daemon is away; the lock lives on meanwhile.
                        pause = min(0.5, lock.ttl / 10)
            time.sleep(pause)


@contextlib.contextmanager
def _losses():
    """Yields a list that has an element afterwards if the daemon said that the lease is lost."""
    lost = []
    try:
        yield lost
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
        lost.append(error)


def _ref(key, lock):
    return pb.LeaseRef(key=key, lease_id=lock.id)


def _duration(seconds):
    duration = Duration()
    duration.FromTimedelta(datetime.timedelta(seconds=seconds))
    return duration
