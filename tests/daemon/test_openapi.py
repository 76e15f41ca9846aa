"""The OpenAPI document and the API: neither has anything that the other has not, and strangers' requests are answered as it says."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import schemathesis
from aiohttp import web
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from hookd.admin.api import Api
from hookd.admin.openapi import document
from hookd.admin.operations import PREFIX, operations, route
from tests.producing import add_endpoint, fetch, send, wait_for_row
from tests.receiver import Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

EXAMPLES = 6
"""Of each operation and mode."""

ALONE = ("positive_data_acceptance", "use_after_free", "ensure_resource_availability")
"""Not checked: a URL or a filter may be refused for what it says, whatever its type."""


def test_every_handler_is_an_operation_and_a_route() -> None:
    described = document(operations(Api))
    router = web.Application().router
    for each in operations(Api):
        router.add_route(*route(object.__new__(Api), each))
    routed = {(r.method, r.resource.canonical.removeprefix(PREFIX)) for r in router.routes() if r.resource}
    said = {(m.upper(), path) for path, methods in described["paths"].items() for m in methods}
    assert routed == said
    public = {name for name, f in vars(Api).items() if callable(f) and not name.startswith("_")}
    assert {each.name for each in operations(Api)} == public, "a handler without an operation"


def test_the_daemon_serves_the_document(start_daemon: Callable[..., DaemonProcess]) -> None:
    admin = start_daemon().admin
    with urllib.request.urlopen(f"{admin}{PREFIX}/openapi.json", timeout=20) as got:
        served = json.loads(got.read())
    assert served == document(operations(Api))
    assert served["openapi"] == "3.1.0"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("server_dsn", ["embedded"], indirect=True)
def test_requests_of_all_kinds_are_answered_as_described(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    admin = start_daemon(
        HOOKD_RETRY__SCHEDULE='["1h"]',
        HOOKD_NETWORK__NAMESERVERS='["127.0.0.1"]',
        HOOKD_DELIVERY__TIMEOUT="2s",
    ).admin

    async def history() -> tuple[str, list[str], list[int]]:
        async with Receiver(always(answer(503))) as bad, Receiver() as good:
            await add_endpoint(dsn, bad.url)
            await add_endpoint(dsn, good.url)
            events = [await send(dsn, "thing.made", '{"id": 1}') for _ in range(5)]
            await wait_for_row(dsn, "select 1 where (select count(*) from hookd.attempt) = 10")
        endpoint = str((await fetch(dsn, "select id from hookd.endpoint limit 1"))[0]["id"])
        numbers = [r["delivery_id"] for r in await fetch(dsn, "select delivery_id from hookd.attempt")]
        return endpoint, events, numbers

    endpoint, events, numbers = asyncio.run(history())
    schema = schemathesis.openapi.from_dict(document(operations(Api)))
    load_all_checks()
    checks: list[Any] = [CHECKS.get_one(name) for name in CHECKS.get_all_names() if name not in ALONE]

    def real(path: str) -> dict[str, Any]:
        if "{number}" in path:
            return {"number": numbers[0]}
        return {"id": events[0] if path.startswith("/events") else endpoint}

    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # a document that is none raises
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @hypothesis.given(
                case=operation.as_strategy(generation_mode=mode),
                known=st.booleans() if mode is GenerationMode.POSITIVE else st.just(value=False),
            )
            @hypothesis.settings(
                max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )  # fmt: skip
            def check(case: schemathesis.Case[Any], known: bool) -> None:
                if known and case.path_parameters:
                    case.path_parameters.update(real(case.path))
                # without it most requests that have no body would end at the gate
                case.call_and_validate(
                    base_url=admin + PREFIX, headers={"Sec-Fetch-Site": "same-origin"}, checks=checks
                )

            check()
