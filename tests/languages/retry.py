"""Checks that a client retries calls that are UNAVAILABLE only with docs/service-config.json.

python retry.py SERVICE_CONFIG STUBS
"""

import pathlib
import sys
from concurrent import futures

import grpc

sys.path.insert(0, sys.argv[2])
from leased.v1 import lease_pb2 as pb  # noqa: E402
from leased.v1 import lease_pb2_grpc  # noqa: E402


class UnavailableTwice(lease_pb2_grpc.LeaseServiceServicer):
    """Fails the first two calls, and answers the third."""

    def __init__(self):
        self.ids = []

    def Acquire(self, request, context):
        self.ids.append(request.lease_id)
        if len(self.ids) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return pb.AcquireResponse(fencing_token=7)


def acquire(options):
    """Makes one call. Returns its outcome, and the lease id of each attempt that arrived."""
    servicer, server = UnavailableTwice(), grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    lease_pb2_grpc.add_LeaseServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        try:
            answer = lease_pb2_grpc.LeaseServiceStub(channel).Acquire(pb.AcquireRequest(lease_id="one"), timeout=30)
            outcome = answer.fencing_token
        except grpc.RpcError as error:
            outcome = error.code()
    server.stop(None)
    return outcome, servicer.ids


config = pathlib.Path(sys.argv[1]).read_text()
assert acquire([("grpc.service_config", config)]) == (7, ["one"] * 3)
assert acquire([]) == (grpc.StatusCode.UNAVAILABLE, ["one"])
print("with the config, the call is retried with the same id; without the config, it is not")
