"""FastAPI as most people write it: lists in JSON, a pydantic model, a plain function."""

import engine
import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()
sessions = engine.open_all()


class Body(BaseModel):
    x: list


@app.post("/predict/{name}")
def predict(name: str, body: Body) -> dict:
    return {"y": sessions[name].run(None, {"x": np.asarray(body.x, np.float32)})[0].tolist()}


if __name__ == "__main__":
    import sys

    uvicorn.run(app, uds=sys.argv[1], log_level="warning", access_log=False)
