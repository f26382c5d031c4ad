"""Inference engines behind one contract: ONNX Runtime and LiteRT here, others by the entry point `edge_agent.runtimes`."""
