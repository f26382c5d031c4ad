"""The messages of both services. They have a pool of their own, so that another library's definitions of the same names may be
in the process.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

from agent.serving.grpc import descriptors

_pool = descriptor_pool.DescriptorPool()
for _data in (descriptors.INFERENCE, descriptors.HEALTH):
    for _file in descriptor_pb2.FileDescriptorSet.FromString(_data).file:
        _pool.AddSerializedFile(_file.SerializeToString())

INFERENCE = _pool.FindServiceByName("inference.GRPCInferenceService")
HEALTH = _pool.FindServiceByName("grpc.health.v1.Health")


def message(name: str) -> Any:
    """The class of a message of the inference service, such as `ModelInferResponse`."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))


def classes_of(method: Any) -> tuple[Any, Any]:
    """What the method takes and gives."""
    return message_factory.GetMessageClass(method.input_type), message_factory.GetMessageClass(method.output_type)


ModelInferRequest = message("ModelInferRequest")
ModelInferResponse = message("ModelInferResponse")
ModelStreamInferResponse = message("ModelStreamInferResponse")
HealthCheckResponse = message_factory.GetMessageClass(_pool.FindMessageTypeByName("grpc.health.v1.HealthCheckResponse"))
