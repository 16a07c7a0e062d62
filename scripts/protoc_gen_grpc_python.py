"""A protoc plugin for gRPC's Python stubs, since `grpc_python` is no builtin of buf's.

buf runs it with a `CodeGeneratorRequest` on stdin and reads a `CodeGeneratorResponse` from stdout. It also marks
each package as typed (PEP 561).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path, PurePosixPath

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc


def generate(request: CodeGeneratorRequest) -> CodeGeneratorResponse:
    """Runs grpc_tools' own generator over the request's files and returns what it wrote."""
    response = CodeGeneratorResponse(supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL)
    with tempfile.TemporaryDirectory() as folder:
        descriptors = Path(folder, "descriptors.binpb")
        descriptors.write_bytes(FileDescriptorSet(file=request.proto_file).SerializeToString())
        out = Path(folder, "out")
        out.mkdir()
        arguments = [
            f"--descriptor_set_in={descriptors}",
            f"--grpc_python_out={out}",
            *request.file_to_generate,
        ]
        if protoc.main(["protoc", *arguments]) != 0:
            response.error = "grpc_tools.protoc failed; its message is above"
            return response
        for path in sorted(out.rglob("*.py")):
            response.file.add(name=path.relative_to(out).as_posix(), content=path.read_text("utf-8"))
    for package in sorted({PurePosixPath(name).parent for name in request.file_to_generate}):
        response.file.add(name=f"{package}/py.typed", content="")
    return response


if __name__ == "__main__":
    sys.stdout.buffer.write(
        generate(CodeGeneratorRequest.FromString(sys.stdin.buffer.read())).SerializeToString()
    )
