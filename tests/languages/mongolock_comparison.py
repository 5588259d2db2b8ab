"""Runs the same scenarios with mongolock 1.3.4 on a MongoDB and with leased_mongolock on a daemon.

The common scenario must give the same results. The others assert the intended differences.

python mongolock_comparison.py MONGODB_URI ENDPOINT
"""

import contextlib
import datetime
import socket
import sys
import threading
import time
import uuid

import grpc
import leased_mongolock
import mongolock
from leased.v1 import lease_pb2 as pb

PATIENCE = 30.0


def until(condition):
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "the condition is not met in time"
        time.sleep(0.05)


def outcome(call, *arguments, **options):
    """Returns what a call returned, or the name of the exception that it raised."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        return type(error).__name__


def same(make):
    """Runs the common scenario, and returns the list of all results that a user can see."""
    one, two = make(), make()
    seen = []

    def see(call, *arguments, **options):
        seen.append((call.__name__, arguments, outcome(call, *arguments, **options)))

    see(one.get_lock_info, "never")
    see(one.is_locked, "never")
    see(one.release, "never", "a")
    see(one.touch, "never", "a", 5)
    see(one.lock, "plain", "a")
    see(one.lock, "plain", "a")
    see(two.lock, "plain", "b")
    see(two.lock, "plain", "b", timeout=0.3)
    see(two.lock, "plain", "b", 0.3, 5)
    see(two.is_locked, "plain")
    see(one.touch, "plain", "a")
    see(one.touch, "plain", "b", 5)
    see(two.release, "plain", "b")
    see(two.is_locked, "plain")
    see(one.release, "plain", "a")
    see(one.release, "plain", "a")
    see(two.is_locked, "plain")
    see(two.lock, "plain", "b", expire=60)
    see(two.touch, "plain", "b", expire=60)

    info = two.get_lock_info("plain")
    seen.append(sorted(info))
    seen.append((info["_id"], info["locked"], info["owner"]))
    seen.append((type(info["created"]), type(info["expire"]), info["created"].tzinfo))
    seen.append(59 < (info["expire"] - info["created"]).total_seconds() < 75)
    seen.append(abs(info["created"] - datetime.datetime.utcnow()) < datetime.timedelta(seconds=PATIENCE))
    two.release("plain", "b")
    seen.append(two.get_lock_info("plain"))

    # Another owner takes a lock that has expired. The first owner learns of it from its next touch.
    see(one.lock, "short", "a", expire=0.5)
    until(lambda: not two.is_locked("short"))
    seen.append(two.get_lock_info("short")["owner"])
    see(two.lock, "short", "b", expire=60)
    see(one.touch, "short", "a", 5)
    see(one.release, "short", "a")
    see(two.is_locked, "short")

    # A lock call that waits.
    see(one.lock, "waited", "a")
    later = threading.Timer(0.5, one.release, ("waited", "a"))
    later.start()
    see(two.lock, "waited", "b", timeout=PATIENCE, expire=60)
    later.join()
    see(two.release, "waited", "b")

    # The object as a context manager.
    with one("block", "a", expire=60):
        see(two.is_locked, "block")
        try:
            with two("block", "b"):
                seen.append("both")
        except Exception as error:
            seen.append((type(error).__name__, type(error).__mro__[1].__name__, "a" in str(error)))
    see(two.is_locked, "block")
    try:
        with one("block", "a", timeout=1):
            raise KeyError("from the work")
    except KeyError:
        see(two.is_locked, "block")
    return seen


def equal_names(make):
    """Two workers have the same name, and the first one's lock has expired.

    Returns the outcome of the first one's touch, and whether its release frees the second one's lock.
    """
    one, two = make(), make()
    assert one.lock("named", "worker", expire=0.5)
    until(lambda: not two.is_locked("named"))
    assert two.lock("named", "worker", expire=60)
    touched = outcome(one.touch, "named", "worker", expire=60)
    one.release("named", "worker")
    return touched, not two.is_locked("named")


def drifting_clocks(make, module):
    """Returns whether a client whose clock is a minute ahead gets a lock with half a minute left."""
    one, two = make(), make()
    assert one.lock("drift", "a", expire=30)
    real = datetime.datetime

    class Ahead(real):
        @classmethod
        def utcnow(cls):
            return real.utcnow() + datetime.timedelta(minutes=1)

    module.datetime = (
        Ahead if module is mongolock else type("datetime_module", (), dict(vars(datetime), datetime=Ahead))
    )
    try:
        return two.lock("drift", "b", expire=30)
    finally:
        module.datetime = real if module is mongolock else datetime


def expiry_of_a_waiter(make):
    """Returns whether a new owner holds the lock after it waited for longer than the lock lasts."""
    one, two = make(), make()
    one.lock("late", "a")
    later = threading.Timer(1.5, one.release, ("late", "a"))
    later.start()
    assert two.lock("late", "b", timeout=PATIENCE, expire=1)
    later.join()
    return two.is_locked("late")


def shorter_touch(make):
    """Returns whether a touch with a shorter expiry shortens the lock."""
    one = make()
    assert one.lock("shorter", "a", expire=60)
    one.touch("shorter", "a", expire=0.2)
    info = one.get_lock_info("shorter")
    return (info["expire"] - info["created"]).total_seconds() < 30


def longer_touch(make):
    """Returns whether another owner gets the lock before the longer expiry of a touch is over."""
    one, two = make(), make()
    assert one.lock("longer", "a", expire=0.5)
    one.touch("longer", "a", expire=3)
    return two.lock("longer", "b", timeout=1.5)


def touch_without_expiry(make):
    """Returns the outcome of a touch without expiry on a lock that has one.

    mongolock 1.1.0 renewed the lock, as the example in mongolock's README says.
    """
    one = make()
    assert one.lock("renewed", "a", expire=60)
    return outcome(one.touch, "renewed", "a")


def other_object(make):
    """Returns the outcome of a touch through an object that did not take the lock itself."""
    one, two = make(), make()
    assert one.lock("other", "a", expire=60)
    return outcome(two.touch, "other", "a", expire=60)


def without_expiry(make):
    """Returns whether the info of a lock without expiry shows none."""
    one = make()
    one.lock("open", "a")
    return one.get_lock_info("open")["expire"] is None


def renews_by_the_original_duration(endpoint):
    """A touch without `expire` renews the lock for the duration with which it was taken."""
    one, two = leased_mongolock.MongoLock(endpoint), leased_mongolock.MongoLock(endpoint)
    assert one.lock("original", "a", expire=2)
    before = one.get_lock_info("original")["expire"]
    until(lambda: one.touch("original", "a") is None and one.get_lock_info("original")["expire"] > before)
    assert two.lock("original", "b", timeout=PATIENCE, expire=2), "the renewed lock does not expire"


def accepts_the_arguments_of_mongolocks_constructor(endpoint):
    """Only programs that name the same database and collection compete for the same locks."""
    make = lambda **options: leased_mongolock.MongoLock(host=endpoint, acquire_retry_step=0.5, **options)
    jobs, same, plain = make(db="jobs"), make(db="jobs", collection="lock"), make()
    assert jobs.lock("kept", "a", expire=60) and not same.lock("kept", "b", expire=60)
    assert plain.lock("kept", "c", expire=60) and plain.is_locked("jobs/lock/kept")
    assert jobs.get_lock_info("kept")["_id"] == "kept" and jobs.get_lock_info("kept")["owner"] == "a"
    jobs.touch("kept", "a")
    jobs.release("kept", "a")
    assert not same.is_locked("kept") and plain.is_locked("kept")
    for wrong in (dict(client=object()), dict(collection=object())):
        assert outcome(make, **wrong) == "TypeError", wrong
    assert outcome(leased_mongolock.MongoLock, "mongodb://localhost") == "ValueError"
    for host, address in [("localhost", "localhost:5327"), ("[::1]", "[::1]:5327"), ("::1", "[::1]:5327"), ("a:1", "a:1")]:
        assert leased_mongolock._with_port(host) == address, host


class Relay:
    """Forwards connections to `endpoint`. `silence` silences open connections, but not later ones."""

    def __init__(self, endpoint):
        host, port = endpoint.rsplit(":", 1)
        self.target, self.silenced = (host, int(port)), threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            caller, called = self.listener.accept()[0], socket.create_connection(self.target)
            for source, sink in [(caller, called), (called, caller)]:
                threading.Thread(target=self.forward, args=(source, sink, self.silenced), daemon=True).start()

    def forward(self, source, sink, silenced):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not silenced.is_set():
                    sink.sendall(data)

    def silence(self):
        self.silenced.set()
        self.silenced = threading.Event()


def notices_a_silent_connection(endpoint):
    relay = Relay(endpoint)
    one = leased_mongolock.MongoLock(relay.address)
    assert one.lock("silent", "a", expire=60)
    relay.silence()
    one.touch("silent", "a")


class Away(grpc.RpcError):
    def code(self):
        return grpc.StatusCode.UNAVAILABLE


def gives_back_what_it_cannot_touch(endpoint):
    """After a wait, a lock counts as granted once it is touched. If the touch fails, the lock is released."""
    one, two = leased_mongolock.MongoLock(endpoint), leased_mongolock.MongoLock(endpoint)
    for failure in (Away, KeyboardInterrupt):
        key = f"ended by {failure.__name__}"

        def fail(*_, failure=failure, **__):
            raise failure

        def release(key=key):
            until(lambda: one._leased.Get(pb.GetRequest(key=key)).lease.waiters)
            one.release(key, "a")

        assert one.lock(key, "a", expire=60)
        later = threading.Thread(target=release)
        later.start()
        touch, two._leased.Touch = two._leased.Touch, fail
        try:
            two.lock(key, "b", timeout=PATIENCE, expire=60)
            raise AssertionError("the lock was granted although the touch failed")
        except failure:
            pass
        finally:
            two._leased.Touch = touch
        later.join()
        assert not two.is_locked(key) and two.fencing_token(key, "b") is None


def main():
    uri, endpoint = sys.argv[1:]
    database = f"leased-test-mongolock-{uuid.uuid4().hex[:8]}"
    real = lambda: mongolock.MongoLock(uri, db=database)
    ours = lambda: leased_mongolock.MongoLock(endpoint)

    expected, found = same(real), same(ours)
    for step, (theirs, mine) in enumerate(zip(expected, found)):
        assert theirs == mine, f"step {step}: mongolock {theirs}, leased_mongolock {mine}"
    assert len(expected) == len(found)

    def differ(scenario, theirs, mine):
        seen = scenario(real), scenario(ours)
        assert seen == (theirs, mine), f"{scenario.__name__}: {seen}"

    differ(equal_names, (None, True), ("MongoLockException", False))
    assert drifting_clocks(real, mongolock) is True
    assert drifting_clocks(ours, leased_mongolock) is False
    differ(expiry_of_a_waiter, False, True)
    differ(shorter_touch, True, False)
    differ(longer_touch, False, False)
    differ(touch_without_expiry, "MongoLockException", None)
    differ(other_object, None, "MongoLockException")
    differ(without_expiry, True, False)
    print(f"{len(expected)} equal results, 8 intended differences")
    renews_by_the_original_duration(endpoint)
    accepts_the_arguments_of_mongolocks_constructor(endpoint)
    notices_a_silent_connection(endpoint)
    gives_back_what_it_cannot_touch(endpoint)


main()
