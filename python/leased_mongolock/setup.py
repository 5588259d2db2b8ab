"""Builds the package: generates the stubs of the API beside it, so that none are committed.

Needs the whole repository, in which the API is defined.
"""

import pathlib
from importlib.metadata import version

import grpc_tools
from grpc_tools import protoc
from setuptools import setup
from setuptools.command.build_py import build_py

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
# google/protobuf/duration.proto and its like.
WELL_KNOWN = pathlib.Path(grpc_tools.__file__).parent / "_proto"


class WithStubs(build_py):
    """Adds the package `leased.v1`, which is also there for whoever wants more than this drop-in."""

    def run(self):
        super().run()
        pathlib.Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        out = [f"--python_out={self.build_lib}", f"--grpc_python_out={self.build_lib}"]
        if protoc.main(["protoc", f"-I{PROTO}", f"-I{WELL_KNOWN}", *out, "leased/v1/lease.proto"]) != 0:
            raise SystemExit(f"the stubs cannot be generated from {PROTO}")


setup(
    cmdclass={"build_py": WithStubs},
    # Stubs run with what is at least as new as what generated them.
    install_requires=[f"grpcio>={version('grpcio-tools')}", f"protobuf>={version('protobuf')}"],
)
