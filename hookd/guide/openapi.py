"""The same as an OpenAPI 3.1 document whose ``webhooks`` are the events, for tools that make receivers of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hookd.core.bodies import CONTENT_TYPES
from hookd.core.model import BodyFormat
from hookd.guide.catalogue import types_of
from hookd.guide.sample import sample
from hookd.guide.writing import length

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hookd.config import Config
    from hookd.guide.catalogue import Catalogue, Described

VERSION = "3.1.1"

HEADERS = {
    "webhook-id": (
        {"type": "string", "format": "uuid"},
        "The event's id; the same over retries and replays.",
    ),
    "webhook-timestamp": (
        {"type": "string", "pattern": "^[0-9]+$"},
        "When this attempt was made, seconds since 1970.",
    ),
    "webhook-signature": (
        {"type": "string"},
        "v1, and base64 of HMAC-SHA256 over {webhook-id}.{webhook-timestamp}.{body}; or v1a, and base64 of an ed25519 signature.",
    ),
    "hookd-attempt": ({"type": "string", "pattern": "^[0-9]+$"}, "1, 2, …: which attempt this is."),
}


def document(config: Config, catalogue: Catalogue) -> dict[str, Any]:
    """The document, for ``json.dumps``."""
    head = catalogue.head
    described = list(types_of(catalogue))
    info: dict[str, Any] = {
        "title": head.title,
        # changes come newest first
        "version": catalogue.changes[0].date.isoformat() if catalogue.changes else "1",
    }
    if head.introduction:
        info["description"] = head.introduction
    return {
        "openapi": VERSION,
        "info": info,
        "webhooks": {one.type: {"post": _operation(one, config)} for one in described},
        "components": {
            "parameters": {
                name: {
                    "name": name, "in": "header", "required": True, "schema": schema, "description": text,
                }
                for name, (schema, text) in HEADERS.items()
            },
        },
    }  # fmt: skip


def _operation(one: Described, config: Config) -> dict[str, Any]:
    form = BodyFormat(config.delivery.format)
    content: dict[str, Any] = {"schema": _body(one, form)}
    if one.example is not None:
        content["example"] = json.loads(sample(one.type, one.example, config).body)
    operation: dict[str, Any] = {
        "operationId": one.type,
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in HEADERS],
        "requestBody": {"required": True, "content": {CONTENT_TYPES[form]: content}},
        "responses": {
            "2XX": {
                "description": f"Taken. Answer within {length(config.delivery.timeout)}; the body does not matter."
            },
            "410": {"description": "Wants no more: the endpoint is switched off."},
            "429": {
                "description": "Too much at once; Retry-After is honoured, as it is with 502, 503 and 504."
            },
            "default": {"description": "Everything else is tried again later."},
        },
    }
    if one.text.summary:
        operation["summary"] = one.text.summary
    if one.text.description:
        operation["description"] = one.text.description
    if one.text.deprecated:
        operation["deprecated"] = True
    return operation


def _body(one: Described, form: BodyFormat) -> dict[str, Any]:
    # a schema of its own document: what it refers to stays within it
    payload: Mapping[str, Any] = _embedded(one) if one.schema is not None else {}
    text = {"type": "string"}
    at = {"type": "string", "format": "date-time"}
    kind = {"const": one.type}
    match form:
        case BodyFormat.RAW:
            return dict(payload)
        case BodyFormat.STANDARD:
            parts: dict[str, Any] = {"type": kind, "timestamp": at, "data": payload}
        case BodyFormat.CLOUDEVENTS:
            parts = {
                "specversion": {"const": "1.0"}, "id": text, "source": text, "type": kind, "time": at,
                "datacontenttype": {"const": "application/json"}, "data": payload,
            }  # fmt: skip
        case BodyFormat.THIN:
            parts = {"type": kind, "timestamp": at, "id": text, "url": {"type": "string", "format": "uri"}}
    return {"type": "object", "required": list(parts), "properties": parts}


def _embedded(one: Described) -> dict[str, Any]:
    schema = dict(one.schema or {})
    schema.pop("$schema", None)
    # with an id of its own, "#/$defs/…" goes on meaning this schema and not the whole document
    schema.setdefault("$id", f"urn:hookd:event:{one.type}")
    return schema
