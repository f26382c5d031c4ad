import sys

import engine
import litserve
import numpy as np


class Predict(litserve.LitAPI):
    def setup(self, device):
        self.sessions = engine.open_all()

    def decode_request(self, request):
        return request["model"], np.asarray(request["x"], np.float32)

    def predict(self, question):
        name, array = question
        return self.sessions[name].run(None, {"x": array})[0]

    def encode_response(self, output):
        return {"y": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Predict(), accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(
        "127.0.0.1", int(sys.argv[1]), num_api_servers=1, log_level="warning", access_log=False, generate_client_file=False
    )
