"""Load on mongolock 1.3.4: callers in several processes. The last line of output is the result as JSON.

python mongolock.py MONGODB_URI pairs|touches CALLERS SECONDS PREFIX
"""

import json
import multiprocessing
import os
import sys
import threading
import time

import mongolock

# More than the processors of a test machine, since Python limits each process to one processor.
PROCESSES = 8
WARM_UP = 0.5


def cpu():
    times = os.times()
    return times.user + times.system


def caller(locks, work, key, owner, start, end, latencies, errors):
    if work == "touches":
        locks.lock(key, owner, expire=600)
    while True:
        begun = time.monotonic()
        if begun >= end:
            return
        try:
            if work == "touches":
                locks.touch(key, owner, expire=600)
            else:
                if not locks.lock(key, owner, expire=600):
                    raise RuntimeError("the lock was not granted")
                locks.release(key, owner)
        except Exception as error:
            errors.append(repr(error))
            time.sleep(0.01)
            continue
        over = time.monotonic()
        if start <= over < end:
            latencies.append(over - begun)


def end_with(parent):
    """Ends this process once its parent has ended, because killing a process does not kill its children."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def process(uri, work, names, seconds, ready, results, parent):
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    # mongolock passes the options of the driver in the URI.
    locks = mongolock.MongoLock(uri, db="leased-bench", collection="mongolock")
    locks.get_lock_info(names[0])
    ready.wait()
    start = time.monotonic() + WARM_UP
    end = start + seconds
    latencies, errors = [], []
    threads = [
        threading.Thread(target=caller, args=(locks, work, name, f"owner-{name}", start, end, latencies, errors))
        for name in names
    ]
    for thread in threads:
        thread.start()
    time.sleep(max(0.0, start - time.monotonic()))
    before = cpu()
    time.sleep(max(0.0, end - time.monotonic()))
    spent = cpu() - before
    for thread in threads:
        thread.join()
    results.put((latencies, errors, spent))


def main():
    uri, work, callers, seconds, prefix = sys.argv[1:]
    callers, seconds = int(callers), float(seconds)
    count = min(PROCESSES, callers)
    ready, results = multiprocessing.Barrier(count), multiprocessing.Queue()
    for number in range(count):
        names = [f"{prefix}/{name}" for name in range(number, callers, count)]
        options = (uri, work, names, seconds, ready, results, os.getpid())
        multiprocessing.Process(target=process, args=options, daemon=True).start()
    latencies, errors, spent = [], [], 0.0
    for _ in range(count):
        some, failed, cost = results.get()
        latencies += some
        errors += failed
        spent += cost
    latencies.sort()
    if errors:
        print(errors[0])

    def at(quantile):
        return 1000 * latencies[int(quantile * (len(latencies) - 1))] if latencies else 0.0

    print(
        json.dumps(
            {
                "done": len(latencies),
                "errors": len(errors),
                "seconds": seconds,
                "p50_ms": at(0.5),
                "p99_ms": at(0.99),
                "cpu": spent,
            }
        )
    )


if __name__ == "__main__":
    main()
