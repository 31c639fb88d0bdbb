"""The routes of OpenAI's API, and what a request goes through on its way to the engine and back."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from infer.server import errors, page
from infer.server.answers import CHAT, COMPLETION, Answer, Kind
from infer.server.errors import ApiError, json_response
from infer.server.guard import Guard, Settings
from infer.server.prepare import Prepared, Served, prepare_chat, prepare_completion
from infer.server.protocol import ChatBody, CompletionBody
from infer.server.service import Job, Service
from qwen_jax.weights import strict_json

# Prompts that are rendered and encoded at once; the engine's thread wants a core, too.
_PREPARERS = 2
# For the description of the API.
_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"description": "refused", "content": {"application/json": {"schema": errors.SCHEMA}}}
    for status in ("4XX", "5XX")
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "whole, or streamed", "content": {"text/event-stream": {}}}
}
T = TypeVar("T")


def make_app(service: Service, served: Served, settings: Settings) -> Guard:
    """The application.

    Args:
      service: the engine, started by the time requests come.
      served: the model.
      settings: what is let in.
    """
    app = FastAPI(title="Qwen in JAX", docs_url=None, redoc_url=None, redirect_slashes=False, responses=_REFUSED)
    app.router.route_class = _StrictRoute
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(ClientDisconnect, _let_go)
    app.add_exception_handler(Exception, _fail)
    _add_model_routes(app, service, served)
    _add_state_routes(app, service)
    _add_page(app)
    return Guard(app, settings, service.metrics)


def _add_model_routes(app: FastAPI, service: Service, served: Served) -> None:
    model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "qwen-jax"}
    model |= {"max_model_len": served.max_length}
    answerer = _Answerer(service, served)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        served.check_name(name)
        return json_response(model)

    @app.post("/v1/chat/completions", responses=_STREAM)
    async def chat(body: ChatBody, request: Request) -> Response:
        return await answerer.answer(request, body, CHAT, prepare_chat)

    @app.post("/v1/completions", responses=_STREAM)
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answerer.answer(request, body, COMPLETION, prepare_completion)


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        if service.error is not None or service.draining:
            raise ApiError(503, "the server is about to end", retry_after=5)
        return json_response({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    async def file(request: Request) -> Response:
        return page.FILES[request.scope["path"]]

    for path in page.FILES:
        app.add_api_route(path, file, include_in_schema=False)


class _Answerer:
    """Takes requests to the engine, and answers back."""

    def __init__(self, service: Service, served: Served) -> None:
        self._service = service
        self._served = served
        self._preparers = ThreadPoolExecutor(_PREPARERS, thread_name_prefix="prepare")

    async def answer(
        self, request: Request, body: Any, kind: Kind, prepare: Callable[[Served, Any], Prepared]
    ) -> Response:
        """The response to a request, whole or a stream."""
        self._served.check_name(body.model)
        job = self._service.open(body.num_rows)
        try:
            answer = await _unless_gone(request, self._begin(job, body, kind, prepare))
            if body.stream:
                return _EventStream(job, answer)
            return await _unless_gone(request, self._whole(job, answer))
        except BaseException:
            job.close()
            raise

    async def _begin(self, job: Job, body: Any, kind: Kind, prepare: Callable[[Served, Any], Prepared]) -> Answer:
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._preparers, prepare, self._served, body)
        await job.start(prepared.requests)
        return Answer(kind, self._served.name, prepared, with_usage=body.with_usage)

    async def _whole(self, job: Job, answer: Answer) -> Response:
        async for row, token in job.tokens():
            answer.push(row, token)
            if answer.ended(row):
                job.cancel(row)
        job.close()
        return json_response(answer.whole())


class _EventStream(StreamingResponse):
    """An answer as server-sent events. However it ends, its rows in the engine end with it."""

    def __init__(self, job: Job, answer: Answer) -> None:
        super().__init__(_events(job, answer), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _events(job: Job, answer: Answer) -> AsyncIterator[str]:
    """An answer as lines of a stream; one that ends without [DONE] is not whole."""
    try:
        yield _lines(answer.begin())
        async for row, token in job.tokens():
            if chunks := answer.push(row, token):
                yield _lines(chunks)
            if answer.ended(row):
                job.cancel(row)
        yield _lines(answer.end()) + "data: [DONE]\n\n"
    except ApiError as error:
        yield _lines([error.body()])


def _lines(chunks: list[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n" for chunk in chunks)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; cancelled, with ClientDisconnect, if the client goes away before."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _StrictRequest(Request):
    """A request whose body is JSON as the standard has it."""

    async def json(self) -> Any:
        try:
            return strict_json.loads(await self.body())
        except ValueError as error:
            raise ApiError(400, f"the body of the request cannot be read: {error}") from None


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return errors.response(error)


async def _refuse_body(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, with the field it is in."""
    assert isinstance(error, RequestValidationError)
    if isinstance(error.body, bytes | None):
        return errors.response(ApiError(400, "send JSON, with the header Content-Type: application/json"))
    first = error.errors()[0]
    message, place = first["msg"].removeprefix("Value error, "), [str(part) for part in first["loc"][1:]]
    if first["type"] == "value_error":  # ours: the message begins with the field
        place = place or re.findall(r"^\w+", message)
    else:
        message = f"{'.'.join(place)}: {message}"
    return errors.response(ApiError(400, message, param=place[0] if place else None))


async def _let_go(request: Request, error: Exception) -> Response:
    """For the record: nobody reads it."""
    return Response(status_code=499)


async def _fail(request: Request, error: Exception) -> Response:
    return errors.response(ApiError(500, "the server failed; its log says how", close=True))
