"""A worker: waits for a key, works while it holds the lease, and releases the lease.

python worker.py KEY [--seconds N] [--endpoint HOST:PORT] [--ttl SECONDS] [--wait SECONDS]

Exits with 0 when the work is done or was interrupted, 69 if no daemon answers, 73 if the lease was
lost, and 75 if another client holds the key. At the start it waits 5 s for a daemon. While it
waits for the key, it repeats failed calls for as long as it may wait.
"""

import argparse
import os
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "build"))

try:
    import grpc
    from leased_lease import CHANNEL_OPTIONS, Held, Lease, Lost
except ImportError as missing:
    sys.exit(f"{missing}: install requirements.txt and generate the stubs into build/, as README.md says")


def main():
    parser = argparse.ArgumentParser(description="Holds a lease while it works.")
    parser.add_argument("key")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long the work takes")
    parser.add_argument("--endpoint", default="127.0.0.1:5327", help="the address of the daemon")
    parser.add_argument("--ttl", type=float, default=10.0, help="the TTL of the lease, in seconds")
    parser.add_argument("--wait", type=float, default=60.0, help="how long to wait for the key at most, in seconds")
    options = parser.parse_args()
    # Both signals raise KeyboardInterrupt, even if the program was started with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    # Also accepts a URL, as leasectl does.
    endpoint = options.endpoint.removeprefix("http://").rstrip("/")
    with grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
        lease = Lease(channel, options.key, f"worker.py:{os.getpid()}", options.ttl, options.wait)
        return run(lease, options.seconds, grpc.channel_ready_future(channel), endpoint)


def run(lease, seconds, connected, endpoint):
    try:
        # `acquire` would try for as long as it may wait, so report a missing daemon now.
        connected.result(timeout=5)
        token = lease.acquire()
        print(f"holding {lease.key} with fencing token {token}", flush=True)
        # The work goes here. It sends the token with every write, and stops when the lease is lost.
        if lease.lost.wait(seconds):
            raise Lost(lease.reason)
        code = 0
    except KeyboardInterrupt:
        code = 0
    except Held as held:
        print(f"not granted: {held}", flush=True)
        return 75
    except Lost as lost:
        print(f"lost: {lost}", flush=True)
        code = 73
    except grpc.FutureTimeoutError:
        print(f"failed: no daemon answers at {endpoint}", flush=True)
        code = 69
    except grpc.RpcError as error:
        print(f"failed: {error.details()}", flush=True)
        code = 69
    if lease.release():
        print("released", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
