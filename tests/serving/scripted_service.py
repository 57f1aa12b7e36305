"""A service whose answers are written down beforehand: `python scripted_service.py LOG < script.json`.

The script is a list of steps, one per request, from the start again at its end: `[status, seconds]`, or with
a third entry true where the whole service stands still for that time. Status 0: the process ends at once. Its
port and, per request, headers, the body's digest and the time are written to LOG, as lines of JSON.
"""

import asyncio
import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path


async def main():
    steps = itertools.cycle(json.load(sys.stdin))
    with Path(sys.argv[1]).open("w", buffering=1) as log:

        async def serve(reader, writer):
            while head := await read_head(reader):
                body = await reader.readexactly(int(head["content-length"]))
                seen = {**head, "sha256": hashlib.sha256(body).hexdigest(), "at": time.monotonic()}
                print(json.dumps(seen), file=log)
                status, seconds, *stands_still = next(steps)
                if status == 0:
                    os._exit(1)
                if stands_still:
                    time.sleep(seconds)
                else:
                    await asyncio.sleep(seconds)
                writer.write(f"HTTP/1.1 {status} Said\r\nContent-Length: 2\r\n\r\n{{}}".encode())

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        print(json.dumps({"port": server.sockets[0].getsockname()[1]}), file=log)
        await server.serve_forever()


async def read_head(reader):
    """The request line, as `request`, and the headers; empty at the end of the connection."""
    try:
        request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return {}
    return {"request": request} | {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}


if __name__ == "__main__":
    asyncio.run(main())
