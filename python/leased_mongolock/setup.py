"""Builds the package and generates the stubs of the API, so that none are committed.

Needs the whole repository, which contains the definition of the API.
"""

import pathlib
from importlib.metadata import version

import grpc_tools
from grpc_tools import protoc
from setuptools import setup
from setuptools.command.build_py import build_py

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
# google/protobuf/duration.proto and others.
WELL_KNOWN = pathlib.Path(grpc_tools.__file__).parent / "_proto"


class WithStubs(build_py):
    """Adds the package `leased.v1` of stubs, which programs may also use directly."""

    def run(self):
        super().run()
        pathlib.Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        out = [f"--python_out={self.build_lib}", f"--grpc_python_out={self.build_lib}"]
        if protoc.main(["protoc", f"-I{PROTO}", f"-I{WELL_KNOWN}", *out, "leased/v1/lease.proto"]) != 0:
            raise SystemExit(f"the stubs cannot be generated from {PROTO}")


setup(
    cmdclass={"build_py": WithStubs},
    # Stubs need a grpcio and protobuf at least as new as the ones that generated them.
    install_requires=[f"grpcio>={version('grpcio-tools')}", f"protobuf>={version('protobuf')}"],
)
