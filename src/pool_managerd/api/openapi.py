"""The OpenAPI 3.1 document and its readable form, made from the route table."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pool_managerd.api.requests import DEVICE_PATTERN
from pool_managerd.api.routing import Route
from pool_managerd.api.schemas import ErrorEnvelope, LeaseGiven, OperationAnswer, Registered
from pool_managerd.api.table import ROUTES
from pool_managerd.config import POOL_ID_PATTERN

CONTROL_API_VERSION = "2.0.0"
_REF = "#/components/schemas/{model}"
_PHRASES = {
    200: "OK", 201: "Created", 202: "Accepted", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    408: "Request Timeout", 409: "Conflict", 413: "Content Too Large", 415: "Unsupported Media Type",
    421: "Misdirected Request", 422: "Unprocessable Content", 429: "Too Many Requests", 500: "Internal Server Error",
    503: "Service Unavailable", 507: "Insufficient Storage",
}  # fmt: skip
"""RFC 9110's own; those of the standard library differ from one Python to the next."""

_OF_POOL = {"pool_id": "$request.path.pool_id"}
_OF_LEASE = {**_OF_POOL, "lease_id": "$response.body#/lease_id"}
_LINKS: dict[type[BaseModel], dict[str, tuple[str, dict[str, str]]]] = {
    LeaseGiven: {
        "renew": ("put_v1_pools_pool_id_leases_lease_id", _OF_LEASE),
        "release": ("delete_v1_pools_pool_id_leases_lease_id", _OF_LEASE),
        "held": ("get_v1_pools_pool_id_leases", _OF_POOL),
    },
    OperationAnswer: {
        "operation": ("get_v1_operations_operation_id", {"operation_id": "$response.body#/operation_id"}),
        "status": ("get_v1_pools_pool_id_status", _OF_POOL),
    },
    Registered: {
        "status": ("get_v1_pools_pool_id_status", _OF_POOL),
        "deregister": ("delete_v1_pools_pool_id", _OF_POOL),
    },
}
"""What an answer can be followed by: the operation, and where its parameters come from."""


def document() -> dict[str, Any]:
    """Everything that is served, as OpenAPI 3.1. The same table always gives the same document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        for index, path in enumerate(route.paths):
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, canonical=index == 0)
    models: set[type[BaseModel]] = {ErrorEnvelope}
    for route in ROUTES:
        models |= {model for model in (*route.answers.values(), route.body) if model is not None}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in ordered], ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pool-managerd control API",
            "version": CONTROL_API_VERSION,
            "description": "Paths under /v1 are canonical; /v2 and, where listed, bare paths are the same operations.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:9200"}],
        "security": [{"bearer": []}, {}],
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def markdown() -> str:
    """The reference page of the HTTP API."""
    lines = [
        "# HTTP API",
        "",
        "Served on `daemon.bind` (default `127.0.0.1:9200`) under `/v1`, with `/v2` as an alias of everything; paths marked",
        "*bare* also without a prefix. The whole contract in OpenAPI 3.1 is in [openapi.json](openapi.json), and served at",
        "`/openapi.json`.",
        "",
        "A bearer token is needed as soon as one is configured, except where marked *open*. Without one, changes and what is",
        "marked *owner* are for the daemon's own user and root on loopback, or for the bearer of `control.token` in its state",
        "directory. HEAD works wherever GET does. Every error has one shape:",
        "`{code, message, error, hint?, retriable, retry_after_ms?, pool_id?, engine?, details?, correlation_id}`.",
        "",
        "| Method | Path | What | Answers | Errors | |",
        "|---|---|---|---|---|---|",
    ]
    for route in ROUTES:
        marks = ", ".join(mark for mark, on in (("bare", route.bare), ("open", route.exempt), ("owner", route.private)) if on)
        query = "".join(f" `?{q.name}=`" for q in route.query)
        answers = ", ".join(f"{status}" for status in sorted(route.answers))
        errors = ", ".join(map(str, route.errors))
        lines.append(f"| {route.method} | `/v1{route.path}`{query} | {route.summary} | {answers} | {errors} | {marks} |")
    return "\n".join([*lines, ""])


def _operation(route: Route, path: str, *, canonical: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route, path),
        "summary": route.summary,
        "responses": _responses(route),
    }
    if not canonical:
        operation["description"] = f"The same as {route.method} {route.paths[0]}."
    if parameters := [*_path_parameters(route), *_query_parameters(route)]:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {"application/json": {"schema": {"$ref": _REF.format(model=route.body.__name__)}}}
        required = any(field.is_required() for field in route.body.model_fields.values()) and route.method == "PUT"
        operation["requestBody"] = {"required": required, "content": content}
    if route.exempt:
        operation["security"] = []
    return operation


def _operation_id(route: Route, path: str) -> str:
    words = [part.strip("{}") for part in path.split("/") if part]
    return "_".join([route.method.lower(), *words])


def _responses(route: Route) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, model in route.answers.items():
        schema: dict[str, Any] = {"type": "string"} if model is None else {"$ref": _REF.format(model=model.__name__)}
        if route.many:
            schema = {"type": "array", "items": schema}
        responses[str(status)] = {"description": _PHRASES[status], "content": {route.media: {"schema": schema}}}
        if model in _LINKS and "{pool_id}" in route.path and not route.many:
            follows = _LINKS[model].items()
            responses[str(status)]["links"] = {name: {"operationId": to, "parameters": given} for name, (to, given) in follows}
    problem = {"application/json": {"schema": {"$ref": _REF.format(model=ErrorEnvelope.__name__)}}}
    for status in sorted({*route.errors, *(() if route.exempt else (401,)), 403, 421}):
        responses.setdefault(str(status), {"description": _PHRASES[status], "content": problem})
    return dict(sorted(responses.items()))


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
    patterns = {"pool_id": POOL_ID_PATTERN, "device": DEVICE_PATTERN}
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "pattern": patterns.get(name, "^[A-Za-z0-9._-]{1,128}$")},
        }
        for name in names
    ]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {"name": q.name, "in": "query", "required": False, "description": q.description, "schema": q.schema} for q in route.query
    ]
