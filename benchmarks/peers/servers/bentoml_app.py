import bentoml
import engine
import numpy as np


@bentoml.service(workers=1, traffic={"timeout": 60}, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Predict:
    def __init__(self):
        self.sessions = engine.open_all()

    @bentoml.api
    def tiny(self, x: np.ndarray) -> np.ndarray:
        return self.sessions["tiny"].run(None, {"x": x.astype(np.float32, copy=False)})[0]

    @bentoml.api
    def image(self, x: np.ndarray) -> np.ndarray:
        return self.sessions["image"].run(None, {"x": x.astype(np.float32, copy=False)})[0]
