"""Errors as every client gets them: RFC 9457 problem details, with a ``code`` that programs can rely on."""

from __future__ import annotations

from http import HTTPStatus

import orjson
from aiohttp import web

MEDIA_TYPE = "application/problem+json"


class Refused(Exception):
    """What was asked for is not done; the message says why, and is fit for whoever asked."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def problem(status: int, code: str, detail: str) -> web.Response:
    """An error as an answer."""
    said = {"title": _title(status), "status": status, "code": code, "detail": detail}
    return web.Response(body=orjson.dumps(said), status=status, content_type=MEDIA_TYPE)


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
