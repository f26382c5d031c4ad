"""What the server says about itself and its models, as plain values that every transport writes in its own form.

Names and nesting are the Open Inference Protocol's and its extensions'. Nothing here changes anything.
"""

from __future__ import annotations

import functools
from collections.abc import Container
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from agent.serving.models.host import ModelHost, Served
from agent.serving.models.version import Version
from agent.serving.scheduling.sequences import Sequences
from runtimes.contract import Quantization, TensorSpec
from runtimes.naming import Interfaces

Document = dict[str, Any]

NAME = "edge-agent"
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "logging",
)
CONFIG_TYPES = {"BYTES": "TYPE_STRING"}  # the others are TYPE_ and the datatype
NO_TRACE = {
    "trace_file": "",
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_mode": "opentelemetry",
}


@functools.cache  # it is looked for among the files of all that is installed
def agent_version() -> str:
    try:
        return version("edge-inference-agent")
    except PackageNotFoundError:
        return "0"


def server(*, shared_memory: bool) -> Document:
    """`shared_memory` is whether system shared memory can be registered."""
    more = ("system_shared_memory",) if shared_memory else ()
    return {"name": NAME, "version": agent_version(), "extensions": [*EXTENSIONS, *more]}


def find_ready(host: ModelHost, name: str, wanted: str | None) -> tuple[Served, Version]:
    """Raises: Refusal (404 unknown, 503 not ready)."""
    found = host.find(name, wanted)
    if not found.answers:
        host.enter(found.name, str(found.number)).leave()
    return host.served(name), found


def metadata(host: ModelHost, name: str, wanted: str | None) -> Document:
    """Raises: Refusal."""
    served, found = find_ready(host, name, wanted)
    document: Document = {
        "name": found.name,
        "versions": [str(n) for n, v in sorted(served.versions.items()) if v.answers],
        "platform": found.runtime,
        "inputs": [_tensor(spec) for spec in found.inputs],
        "outputs": [_tensor(spec) for spec in found.outputs],
    }
    if found.interfaces.signatures:
        document["parameters"] = {
            "default_signature": found.interfaces.default_name,
            "signatures": signatures(found.interfaces),
        }
    return document


def signatures(interfaces: Interfaces) -> Document:
    """What each signature that the file names takes and gives, under its names. `tensor` is the model's own name of one."""
    own = {spec.name for spec in (*interfaces.plain.said_inputs, *interfaces.plain.said_outputs)}
    return {
        name: {
            role: [_signed(spec, names[spec.name].name, own) for spec in specs]
            for role, specs, names in (
                ("inputs", found.said_inputs, found.inputs),
                ("outputs", found.said_outputs, found.outputs),
            )
        }
        for name, found in interfaces.signatures.items()
    }


def _signed(spec: TensorSpec, tensor: str, own: Container[str]) -> Document:
    document = _tensor(spec)
    return {**document, "tensor": tensor} if tensor in own else document


def _tensor(spec: TensorSpec) -> Document:
    document: Document = {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}
    parameters: Document = {} if spec.quantization is None else {"quantization": _quantization(spec.quantization)}
    if spec.optional:
        parameters["optional"] = True
    if spec.any_rank:
        parameters["unknown_rank"] = True
    return {**document, "parameters": parameters} if parameters else document


def _quantization(quantization: Quantization) -> Document:
    if quantization.axis is None and len(quantization.scales) == 1:
        return {"scale": quantization.scales[0], "zero_point": quantization.zero_points[0]}
    return {"scale": quantization.scales, "zero_point": quantization.zero_points, "axis": quantization.axis}


def index(host: ModelHost, *, only_ready: bool) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for served in host:
        for number, item in sorted(served.versions.items()):
            if only_ready and item.state != "READY":
                continue
            entry = {"name": served.name, "version": str(number), "state": item.state}
            found.append({**entry, "reason": item.reason} if item.reason else entry)
    return found


def config(host: ModelHost, name: str, wanted: str | None) -> Document:
    """The model's configuration as Triton writes one: what its clients decide by, all of it true here.  Raises: Refusal."""
    served, found = find_ready(host, name, wanted)
    serving = found.serving
    batched = serving.max_batch_size > 1
    versions = sorted(number for number, v in served.versions.items() if v.answers)
    document: Document = {
        "name": found.name,
        "platform": found.runtime,
        "backend": found.runtime,
        "version_policy": {"specific": {"versions": versions}},
        "max_batch_size": serving.max_batch_size if batched else 0,
        "input": [
            {
                "name": spec.name,
                "data_type": config_type(spec),
                "format": "FORMAT_NONE",
                "dims": _dims(spec, batched=batched),
                "is_shape_tensor": False,
                "allow_ragged_batch": False,
                "optional": spec.optional,
                "is_non_linear_format_io": False,
            }
            for spec in found.inputs
        ],
        "output": [
            {
                "name": spec.name,
                "data_type": config_type(spec),
                "dims": _dims(spec, batched=batched),
                "label_filename": "labels" if spec.name in found.labels else "",
                "is_shape_tensor": False,
                "is_non_linear_format_io": False,
            }
            for spec in found.outputs
        ],
        "batch_input": [],
        "batch_output": [],
        "instance_group": [_instances(found)],
        "default_model_filename": found.filename,
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {key: {"string_value": value} for key, value in _parameters(found).items()},
        "model_warmup": [{"name": found.serving.warm_up or "zeros", "batch_size": 1, "count": 2}]
        if found.loaded.is_warm
        else [],
        "model_transaction_policy": {"decoupled": False},
    }
    document.update(_scheduling(found))
    return document


def config_type(spec: TensorSpec) -> str:
    return CONFIG_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}")


def _dims(spec: TensorSpec, *, batched: bool) -> list[int]:
    """Without the batch's dimension where the configuration has a maximal batch size, as its readers expect."""
    return list(spec.shape[1:] if batched else spec.shape)


def _instances(found: Version) -> Document:
    accelerated = found.placement.actual not in ("", "cpu")
    return {
        "name": f"{found.name}_0",
        "kind": "KIND_GPU" if accelerated else "KIND_CPU",
        "count": found.serving.instances or 1,
        "gpus": [0] if accelerated else [],
        "secondary_devices": [],
        "profile": [],
        "passive": False,
        "host_policy": "",
    }


def _parameters(found: Version) -> dict[str, str]:
    """What the configuration has no field for."""
    placement = found.placement
    said = {
        "variant": found.variant,
        "sha256": found.sha256,
        "placement_requested": placement.requested,
        "placement_actual": placement.actual,
        "placement_fallback": placement.fallback or "",
    }
    if found.interfaces.signatures:
        said["default_signature"] = found.interfaces.default_name
        said["signatures"] = msgspec.json.encode(signatures(found.interfaces)).decode()
    return {key: value for key, value in said.items() if value}


def _scheduling(found: Version) -> Document:
    serving = found.serving
    if found.lane.sequences is not None:
        return {"sequence_batching": _sequences(found.lane.sequences)}
    if serving.max_batch_size <= 1:
        return {}
    return {
        "dynamic_batching": {
            "preferred_batch_size": list(serving.preferred_batch_sizes),
            "max_queue_delay_microseconds": serving.max_delay_us,
            "preserve_ordering": False,
            "priority_levels": serving.priority_levels,
            "default_priority_level": serving.default_priority,
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": serving.default_timeout_us,
                "allow_timeout_override": True,
                "max_queue_size": serving.max_queue_size,
            },
            "priority_queue_policy": {},
        }
    }


def _sequences(sequences: Sequences[Any]) -> Document:
    return {
        "max_sequence_idle_microseconds": int(sequences.idle_s * 1e6),
        "control_input": [],
        "state": [],
        "oldest": {"max_candidate_sequences": sequences.limit, "preferred_batch_size": [], "max_queue_delay_microseconds": 0},
    }


def statistics(host: ModelHost, name: str | None, wanted: str | None) -> list[Document]:
    """The statistics of one version, of all versions of one model, or of all models.  Raises: Refusal (404)."""
    if name is None:
        versions = [v for served in host for v in served.versions.values()]
    elif wanted is None:
        versions = list(host.served(name).versions.values())
    else:
        versions = [host.find(name, wanted)]
    return [_statistics(v) for v in sorted(versions, key=lambda v: (v.name, v.number))]


def _statistics(item: Version) -> Document:
    stats = item.stats
    none = {"count": 0, "ns": 0}
    return {
        "name": item.name,
        "version": str(item.number),
        "last_inference": int(stats.last_unix_s * 1000),
        "inference_count": stats.inferences,
        "execution_count": stats.executions,
        "inference_stats": {
            "success": _duration(stats.ok, stats.total_s),
            "fail": _duration(sum(stats.failures.values()) + stats.cancelled, 0.0),
            "queue": _duration(stats.ok, stats.queue_s),
            "compute_input": _duration(stats.ok, stats.input_s),
            "compute_infer": _duration(stats.ok, stats.run_s),
            "compute_output": _duration(stats.ok, stats.output_s),
            "cache_hit": none,
            "cache_miss": none,
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": batch.size,
                "compute_input": _duration(batch.executions, batch.input_s),
                "compute_infer": _duration(batch.executions, batch.run_s),
                "compute_output": _duration(batch.executions, batch.output_s),
            }
            for batch in stats.batches
        ],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": item.loaded.now_bytes}],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * 1e9)}
