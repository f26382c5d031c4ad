"""FastAPI with uvicorn at its best: raw bytes in, raw bytes out, on a Unix socket."""

import engine
import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()
sessions = engine.open_all()


@app.post("/predict/{name}")
async def predict(name: str, request: Request) -> Response:
    array = np.frombuffer(await request.body(), np.float32).reshape(engine.SHAPES[name])
    return Response(sessions[name].run(None, {"x": array})[0].tobytes())


if __name__ == "__main__":
    import sys

    uvicorn.run(app, uds=sys.argv[1], log_level="warning", access_log=False)
