import engine
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Onnx(MLModel):
    async def load(self) -> bool:
        self.session = engine.open_session(self.settings.name)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        output = self.session.run(None, {"x": NumpyCodec.decode_input(payload.inputs[0])})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", output)])
