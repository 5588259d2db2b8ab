"""One scenario through mongolock 1.3.4 on a MongoDB and through leased_mongolock on a daemon; what differs is asserted.

python mongolock_comparison.py MONGODB_URI ENDPOINT
"""

import datetime
import sys
import threading
import time
import uuid

import leased_mongolock
import mongolock

PATIENCE = 30.0


def until(condition):
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "it does not come about"
        time.sleep(0.05)


def outcome(call, *arguments, **options):
    """What a call returned, or the name of what it raised."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        return type(error).__name__


def same(make):
    """What a user of either may rely on: a list of what was seen."""
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
    see(two.touch, "plain", "b")
    see(two.touch, "plain", "b", expire=60)

    info = two.get_lock_info("plain")
    seen.append(sorted(info))
    seen.append((info["_id"], info["locked"], info["owner"]))
    seen.append((type(info["created"]), type(info["expire"]), info["created"].tzinfo))
    seen.append(59 < (info["expire"] - info["created"]).total_seconds() < 75)
    seen.append(abs(info["created"] - datetime.datetime.utcnow()) < datetime.timedelta(seconds=PATIENCE))
    two.release("plain", "b")
    seen.append(two.get_lock_info("plain"))

    # A lock that ran out is taken by another, and its first holder hears of it with its next touch.
    see(one.lock, "short", "a", expire=0.5)
    until(lambda: not two.is_locked("short"))
    seen.append(two.get_lock_info("short")["owner"])
    see(two.lock, "short", "b", expire=60)
    see(one.touch, "short", "a", 5)
    see(one.release, "short", "a")
    see(two.is_locked, "short")

    # Waiting.
    see(one.lock, "waited", "a")
    later = threading.Timer(0.5, one.release, ("waited", "a"))
    later.start()
    see(two.lock, "waited", "b", timeout=PATIENCE, expire=60)
    later.join()
    see(two.release, "waited", "b")

    # The context manager.
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
    """Two workers of one name, of which the first is late. Whether its touch succeeds, and whether its release frees
    the lock of the second."""
    one, two = make(), make()
    assert one.lock("named", "worker", expire=0.5)
    until(lambda: not two.is_locked("named"))
    assert two.lock("named", "worker", expire=60)
    touched = outcome(one.touch, "named", "worker", expire=60)
    one.release("named", "worker")
    return touched, not two.is_locked("named")


def drifting_clocks(make, module):
    """Whether a client whose clock is a minute ahead gets a lock that has half a minute to go."""
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
    """Whether a lock that was waited for longer than it lasts is held after the grant."""
    one, two = make(), make()
    one.lock("late", "a")
    later = threading.Timer(1.5, one.release, ("late", "a"))
    later.start()
    assert two.lock("late", "b", timeout=PATIENCE, expire=1)
    later.join()
    return two.is_locked("late")


def shorter_touch(make):
    """Whether a touch with a shorter expiry shortens the lock."""
    one = make()
    assert one.lock("shorter", "a", expire=60)
    one.touch("shorter", "a", expire=0.2)
    info = one.get_lock_info("shorter")
    return (info["expire"] - info["created"]).total_seconds() < 30


def longer_touch(make):
    """Whether a touch with a longer expiry makes the lock last so long."""
    one, two = make(), make()
    assert one.lock("longer", "a", expire=0.5)
    one.touch("longer", "a", expire=3)
    return two.lock("longer", "b", timeout=1.5)


def other_object(make):
    """What a touch by an object says that did not take the lock."""
    one, two = make(), make()
    assert one.lock("other", "a", expire=60)
    return outcome(two.touch, "other", "a", expire=60)


def without_expiry(make):
    """What a lock without expiry shows as one."""
    one = make()
    one.lock("open", "a")
    return one.get_lock_info("open")["expire"] is None


def main():
    uri, endpoint = sys.argv[1:]
    database = f"leased-test-mongolock-{uuid.uuid4().hex[:8]}"
    real = lambda: mongolock.MongoLock(uri, db=database)
    ours = lambda: leased_mongolock.MongoLock(endpoint)

    wanted, found = same(real), same(ours)
    for line, (theirs, mine) in enumerate(zip(wanted, found)):
        assert theirs == mine, f"line {line}: mongolock {theirs}, leased_mongolock {mine}"
    assert len(wanted) == len(found)

    def differ(scenario, theirs, mine):
        seen = scenario(real), scenario(ours)
        assert seen == (theirs, mine), f"{scenario.__name__}: {seen}"

    differ(equal_names, (None, True), ("MongoLockException", False))
    assert drifting_clocks(real, mongolock) is True
    assert drifting_clocks(ours, leased_mongolock) is False
    differ(expiry_of_a_waiter, False, True)
    differ(shorter_touch, True, False)
    differ(longer_touch, False, False)
    differ(other_object, None, "MongoLockException")
    differ(without_expiry, True, False)
    print(f"{len(wanted)} lines alike, 7 scenarios told apart")


main()
