"""TensorRT: what its engine files are, and how they are made from ONNX models.

Three libraries speak one API: `tensorrt` (which JetPack ships), `tensorrt_lean` (which only runs), and TensorRT-RTX, whose builder works on a
machine without a GPU. Whatever calls one of them belongs into a process that may die: the lean one ends the process when there is no driver.
"""
