"""The OpenAPI 3.1 document of the API, made of its operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from hookd import __version__
from hookd.admin import schema
from hookd.admin.access import ACTOR_HEADER
from hookd.admin.operations import PREFIX
from hookd.admin.problems import MEDIA_TYPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookd.admin.operations import Operation

REF = "#/components/schemas/{name}"

ABOUT = """Everything that hookd's console shows and does, for programs.

Lists are pages: follow `next` until it is null, with the same parameters. A search looks for a moment and then answers with what it
has: a page may be short, or empty, and still have a `next`. Errors are problem details (RFC 9457) with a `code`.

Where no token is set, a `POST` has to show that no page of another site sent it: it says `Content-Type: application/json`, with or
without a body, or `Hookd-Actor`, or (a browser's) `Sec-Fetch-Site` or `Origin` of this server."""

ON_PROBLEM = {
    "description": "It was not done.",
    "content": {MEDIA_TYPE: {"schema": {"$ref": REF.format(name="Problem")}}},
}

PARAMETERS = {"id": "Its id.", "number": "Its number."}


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The document, as JSON has it."""
    answers = [o.answer for o in operations if o.answer is not None]
    bodies = [o.body for o in operations if o.body is not None]
    queries = [o.query for o in operations if o.query is not None]
    _, components = msgspec.json.schema_components(
        [*answers, *bodies, *queries, schema.Problem], ref_template=REF
    )
    fields = {q.__name__: components.pop(q.__name__) for q in dict.fromkeys(queries)}
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, fields)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hookd",
            "version": __version__,
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": PREFIX}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "What is in `admin.token_file`; on loopback none may be needed.",
                }
            },
        },
    }


def _operation(each: Operation, fields: dict[str, Any]) -> dict[str, Any]:
    summary, _, more = each.said.partition("\n")
    tag = each.path.split("/")[1]
    said: dict[str, Any] = {"operationId": each.name, "tags": [tag], "summary": summary.rstrip(".")}
    if more.strip():
        said["description"] = " ".join(more.split())
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": PARAMETERS[name],
            "schema": _plain(kind),
        }
        for name, kind in each.places.items()
    ]
    if each.query is not None:
        parameters += [_parameter(n, f) for n, f in fields[each.query.__name__]["properties"].items()]
    if each.with_caller:
        parameters.append(
            {
                "name": ACTOR_HEADER,
                "in": "header",
                "description": "For whom you act: a name for the audit trail, of which 100 characters are kept. Where no token "
                "is set, a POST that has neither a JSON body nor its content type needs it.",
                "schema": {"type": "string"},
            }
        )
    if parameters:
        said["parameters"] = parameters
    if each.body is not None:
        said["requestBody"] = {
            "required": any(f.required for f in msgspec.structs.fields(each.body)),
            "content": {"application/json": {"schema": {"$ref": REF.format(name=each.body.__name__)}}},
        }
    done: dict[str, Any] = {"description": "Done."}
    if each.answer is not None:
        done["content"] = {"application/json": {"schema": {"$ref": REF.format(name=each.answer.__name__)}}}
    said["responses"] = {str(status): done for status in each.statuses} | {"default": ON_PROBLEM}
    return said


def _plain(kind: Any) -> dict[str, Any]:
    return msgspec.json.schema(kind)


def _parameter(name: str, field: dict[str, Any]) -> dict[str, Any]:
    """A field of a query: null is what is not given, so it is no value."""
    field = dict(field)
    field.pop("default", None) if field.get("default", 0) in (None, []) else None
    description = field.pop("description", None)
    choices = [c for c in field.get("anyOf", ()) if c != {"type": "null"}]
    if choices:
        (field,) = ({**field, **choices[0]},)
        field.pop("anyOf")
        description = field.pop("description", None) or description
    if "enum" in field:
        field["enum"] = [value for value in field["enum"] if value is not None]
    said: dict[str, Any] = {"name": name, "in": "query", "schema": field}
    if description:
        said["description"] = description
    return said
