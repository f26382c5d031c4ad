import sys

import engine
import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def answers(session):
    return lambda requests: [{"y": session.run(None, {"x": request["x"]})[0]} for request in requests]


if __name__ == "__main__":
    port, workspace = int(sys.argv[1]), sys.argv[2]
    config = TritonConfig(http_address="127.0.0.1", http_port=port, allow_grpc=False, allow_metrics=False, log_verbose=0)
    with Triton(config=config, workspace=workspace) as triton:
        for name, shape in engine.SHAPES.items():
            triton.bind(
                model_name=name,
                infer_func=answers(engine.open_session(name)),
                inputs=[Tensor(name="x", dtype=np.float32, shape=shape)],
                outputs=[Tensor(name="y", dtype=np.float32, shape=(1, 10))],
                config=ModelConfig(batching=False),
            )
        triton.serve()
