"""What a lease call is measured beside: ``python -m bench.lease_peers aiohttp|fixed PORT``.

``aiohttp`` is a bare aiohttp application with a constant answer; ``fixed`` answers fixed bytes without reading the
request: what the client itself can reach.
"""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web

_BODY = b'{"lease_id":"0123456789abcdef-1","active_leases":1}'
_FIXED = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)


async def _given(_: web.Request) -> web.Response:
    return web.Response(status=201, body=_BODY, content_type="application/json")


async def _taken(_: web.Request) -> web.Response:
    return web.Response(body=b'{"active_leases":0}', content_type="application/json")


async def _healthy(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


class _Fixed(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if isinstance(self._transport, asyncio.WriteTransport):
            self._transport.write(_FIXED)


async def _serve(kind: str, port: int) -> None:
    if kind == "aiohttp":
        app = web.Application()
        app.router.add_get("/health", _healthy)
        app.router.add_post("/v1/pools/{pool_id}/leases", _given)
        app.router.add_delete("/v1/pools/{pool_id}/leases/{lease_id}", _taken)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()
    server = await asyncio.get_running_loop().create_server(_Fixed, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
