"""What operators look at: on a listener of its own callers cannot reach it, and it needs no key."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tael.server.service import Service

health = APIRouter()
metrics = APIRouter()


@health.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@health.get("/health/ready", response_model=None)
async def ready(request: Request) -> Response:
    """The engine moves, and requests are taken. Say so to a load balancer."""
    is_ready = request.app.state.service.is_ready
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)


@metrics.get("/metrics", response_model=None)
async def metrics_text(request: Request) -> Response:
    text = request.app.state.service.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def create_operators_app(service: Service) -> FastAPI:
    """The ASGI application of the second listener."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(health)
    app.include_router(metrics)
    return app
