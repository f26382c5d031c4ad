import logging
import sys

import engine
import kserve


class Onnx(kserve.Model):
    def __init__(self, name):
        super().__init__(name)
        self.session = engine.open_session(name)
        self.ready = True

    def predict(self, payload, headers=None, *_rest, **_more):
        output = self.session.run(None, {"x": payload.inputs[0].as_numpy()})[0]
        described = kserve.InferOutput("y", list(output.shape), "FP32")
        described.set_data_from_numpy(output, binary_data=True)
        return kserve.InferResponse(
            response_id=payload.id or "0", model_name=self.name, infer_outputs=[described], use_binary_outputs=True
        )


if __name__ == "__main__":
    logging.disable(logging.INFO)  # a line per request is not what is compared
    server = kserve.ModelServer(http_port=int(sys.argv[1]), enable_grpc=False, workers=1, enable_latency_logging=False)
    server.start([Onnx(name) for name in engine.SHAPES])
