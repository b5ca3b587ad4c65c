"""The routes, and what stands before all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tael import __version__
from tael.economics.keys import Key
from tael.economics.rate_card import ServiceTier
from tael.server import anthropic, chat, completions, operators, page, responses
from tael.server.access import Access, BodyLimit
from tael.server.anthropic_schema import CountTokensRequest, MessagesRequest
from tael.server.errors import ApiError, bad_request
from tael.server.live import live_view
from tael.server.openai_schema import ChatRequest, CompletionRequest, TokenizeRequest
from tael.server.responses_schema import ResponsesRequest
from tael.server.service import Run, Service
from tael.server.streaming import ClientGoneError, EventStream, until_disconnect
from tael.server.validation import first_error

Answer = Callable[[Run], Coroutine[Any, Any, dict[str, Any] | EventStream]]

router = APIRouter()


@router.get("/live")
async def live_figures(request: Request) -> dict[str, Any]:
    """What the page shows beside the chat."""
    return live_view(_service(request), _key(request))


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(_service(request))]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    _service(request).check_model(name)
    return _model(_service(request))


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    service = _service(request)
    return await _run(request, body.model, body.tier, lambda run: chat.answer(service, run, body))


@router.post("/v1/completions", response_model=None)
async def text_completions(body: CompletionRequest, request: Request) -> Response:
    service = _service(request)
    return await _run(
        request, body.model, body.tier, lambda run: completions.answer(service, run, body)
    )


@router.post("/v1/responses", response_model=None)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    service = _service(request)
    return await _run(
        request, body.model, body.tier, lambda run: responses.answer(service, run, body)
    )


@router.post("/v1/messages", response_model=None)
async def messages(body: MessagesRequest, request: Request) -> Response:
    service = _service(request)
    return await _run(
        request, body.model, body.tier, lambda run: anthropic.answer(service, run, body)
    )


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, request: Request) -> dict[str, int]:
    service = _service(request)
    service.check_model(body.model)
    with service.admission.request(_key(request)):
        return {"input_tokens": len(await anthropic.prompt_of(service, body))}


@router.post("/v1/embeddings", include_in_schema=False)
async def embeddings(request: Request) -> None:
    """By name, so that callers learn what the matter is and not that they mistyped."""
    raise ApiError(
        404,
        f"The model {_service(request).model!r} writes text; this server has no model that gives "
        "embeddings.",
        "unsupported_endpoint",
    )


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    service = _service(request)
    if body.model is not None:
        service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give either prompt or messages.", param="prompt")
    tokenizer = service.engine.tokenizer
    with service.admission.request(_key(request)):
        if body.prompt is not None:
            text, special = body.prompt, body.add_special_tokens
            ids = await completions.encoded(service, text, special)
        else:
            turns = [chat.template_message(message) for message in body.messages or ()]
            ids = await service.in_thread(lambda: tokenizer.apply_chat_template(turns))
    answer = {"count": len(ids), "max_model_len": service.engine.ready.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in ids]
    return answer


async def _run(request: Request, model: str, service_tier: ServiceTier, answer: Answer) -> Response:
    """Let a request in, and answer it as long as somebody waits for that."""
    service = _service(request)
    service.check_model(model)
    run = service.run(_key(request), service_tier)
    try:
        result = await until_disconnect(request.receive, answer(run))
    except BaseException as error:
        run.close()
        if isinstance(error, ClientGoneError):
            return Response(status_code=499)  # nginx's number; nobody reads it
        if isinstance(error, ApiError):
            error.headers = {**run.headers, **error.headers}
        raise
    if isinstance(result, EventStream):
        return result  # closes the run
    run.close()
    return JSONResponse(result, headers=run.headers)


def create_app(
    service: Service,
    *,
    max_body_bytes: int,
    allowed_hosts: frozenset[str] | None,
    has_metrics: bool,
) -> FastAPI:
    """The ASGI application. ``allowed_hosts`` are the names by which callers may call it; None
    for any. It ``has_metrics`` unless they have a listener of their own."""
    app = FastAPI(
        title="Tael", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    app.include_router(operators.health)
    if has_metrics:
        app.include_router(operators.metrics)
    app.include_router(router)
    app.include_router(page.router)

    def failure(request: Request, error: ApiError) -> Response:
        service.metrics.error(error.status)
        return JSONResponse(error.body(request.scope["path"]), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return failure(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        return failure(request, first_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{error.detail} ({request.method} {request.scope['path']})"
        return failure(request, ApiError(error.status_code, message, code, headers=error.headers))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return failure(request, ApiError(500, "The server failed on this request.", "internal"))

    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(Access, keys=service.keys, allowed_hosts=allowed_hosts)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _key(request: Request) -> Key:
    key: Key = request.state.key
    return key


_STARTED = int(time.time())


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": _STARTED,
        "owned_by": "tael",
        "max_model_len": service.engine.ready.max_model_len,
    }
