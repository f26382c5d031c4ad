"""Why a model cannot be built into an engine, in words, with what to change: from what parsers and builders say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runtimes.messages import plain

FOR_TENSORRT = "quantize it with signed, symmetric int8 for activations and weights, and leave the bias in float"
MOST_NODES = 3

ADVICE = (
    (re.compile(r"has type Int32 but must have type|QuantizeBias"), "its bias is quantized, which TensorRT does not take: " + FOR_TENSORRT),
    (re.compile(r"type of UINT8|type UInt8|uint8"), "it is quantized with uint8, and TensorRT takes int8: " + FOR_TENSORRT),
    (re.compile(r"[Nn]on-zero zero point|zero point is not"), "it is quantized with zero points that are not 0: " + FOR_TENSORRT),
    (re.compile(r"Plugin not found"), "TensorRT has no such operator: write it with the usual ones, or serve this file with ONNX Runtime"),
    (re.compile(r"graphScope|kUNDEFINED|IIfConditional|ILoop"), "its If, Loop or Scan cannot be built: export the model without control flow, or serve this file with ONNX Runtime"),
    (re.compile(r"FP32 GEMM is not supported"), "GPUs of this kind have no kernels for matrices in FP32: export the model in FP16, or build for a later compute capability"),
    (re.compile(r"no optimization profile"), "it has inputs of free size: say which sizes they may have"),
)  # fmt: skip
QUANTIZED_OPERATORS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize")
OF_THE_SOURCE = re.compile(
    r"\(?In \w+ at [^)]*\)?|\[\w+\.cpp(?:::\w+)?:+\d+(?:\]|: \w+\])|Error Code \d+: |API Usage Error|Internal Error|Myelin|I[A-Z]\w+::\w+: "
    r"|Invalid Node - \S+|Assertion failed: |status\.is_success\(\): |shiftIsAllZeros\(zeroPoint\): |creator && "
)
CUDA = re.compile(r"[^\n]*cudaError[^\n]*")
NOT_SUPPORTED = "false"  # all that the parser says of an operator that it does not know


@dataclass(frozen=True, slots=True)
class Complaint:
    """What the parser says of one node. `node` is its number in the file; -1: it does not know."""

    said: str
    node: int = -1
    name: str = ""
    operator: str = ""

    @property
    def place(self) -> str:
        named = f"{self.operator or 'a node'}" + (f" {self.name!r}" if self.name else "")
        return f"{named} (node {self.node})" if self.node >= 0 else named


def of_parser(complaints: Sequence[Complaint]) -> str:
    """Why a model cannot be read: the first nodes, and what to change."""
    named = "; ".join(f"{one.place}: {_plain(one.said)}".replace(": is not", " is not") for one in complaints[:MOST_NODES])
    others = f"; {len(complaints) - MOST_NODES} more nodes" if len(complaints) > MOST_NODES else ""
    advice = _advice((one.said, one.operator) for one in complaints)
    return f"TensorRT cannot read it: {named}{others}{advice}"


def of_builder(messages: Sequence[str]) -> str:
    """Why a model that was read cannot be built. `messages`: the errors that the builder logged."""
    said = next((_plain(text) for text in messages if _plain(text)), "it does not say why")
    return f"TensorRT cannot build it: {said}{_advice((text, '') for text in messages)}"


def _advice(said: Iterable[tuple[str, str]]) -> str:
    for text, operator in said:
        if operator.startswith(QUANTIZED_OPERATORS):
            return f". It is quantized with operators that only ONNX Runtime has ({operator}): save it with QuantizeLinear and DequantizeLinear (QDQ); {FOR_TENSORRT}"
        for pattern, advice in ADVICE:
            if pattern.search(text):
                return f". {advice[0].upper()}{advice[1:]}"
    return ""


def _plain(said: str) -> str:
    """The text without the builder's places in its own source, and without what it says of a driver that is not needed to build."""
    text = plain(OF_THE_SOURCE.sub("", CUDA.sub("", said))).strip(' .:()"')
    return "is not supported" if text == NOT_SUPPORTED else text
