"""FastAPI under uvicorn, as users of FastAPI write it, with uvloop and httptools as in uvicorn[standard]."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI, Request, Response

from benchmarks.processes import print_ready_once_open

app = FastAPI()


@app.post("/echo")
async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/octet-stream")


if __name__ == "__main__":
    port = int(sys.argv[1])
    print_ready_once_open(port)
    uvicorn.run(app, port=port, loop="uvloop", http="httptools", log_level="warning", access_log=False)
