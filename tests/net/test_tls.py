"""TLS to receivers: which authorities, which versions, whose name; with addresses that are dialled as they were vetted."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from hookd.config import ConfigInvalid, parse
from hookd.core.model import OutcomeKind
from hookd.net.exchange import ExchangeOptions, HttpExchange, tls_context
from hookd.net.resolver import Resolver
from tests.net.test_exchange import LOOPBACK, request
from tests.net.test_resolver import A, Dns
from tests.receiver import OK, Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hookd.core.model import Outcome

NAME = "hooks.example.com"

V = ssl.TLSVersion


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


class Server:
    """A TLS context of a receiver, and the names that were asked of it."""

    def __init__(
        self, authority: trustme.CA, *names: str, most: V = V.MAXIMUM_SUPPORTED, **issued: Any
    ) -> None:
        self.asked: list[str | None] = []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names, **issued).configure_cert(self.context)
        self.context.sni_callback = lambda _socket, name, _context: self.asked.append(name)
        if most is not V.MAXIMUM_SUPPORTED:
            old(self.context, most)


def old(context: ssl.SSLContext, most: V) -> None:
    """Let a context speak versions that nobody should."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = V.TLSv1 if most < V.TLSv1_2 else most
        context.maximum_version = most
    context.set_ciphers("ALL:@SECLEVEL=0")


@contextlib.asynccontextmanager
async def named(context: ssl.SSLContext, **options: Any) -> AsyncIterator[HttpExchange]:
    """An exchange for which the name leads to loopback."""
    transport, dns = await asyncio.get_running_loop().create_datagram_endpoint(
        Dns, local_addr=("127.0.0.1", 0)
    )
    dns.records[NAME, A] = ["127.0.0.1"]
    port = transport.get_extra_info("sockname")[1]
    mono = asyncio.get_running_loop().time
    resolver = Resolver(lambda: LOOPBACK, nameservers=[f"127.0.0.1:{port}"], mono=mono)
    http = HttpExchange(
        resolver, lambda: LOOPBACK, ExchangeOptions(**options), wall=lambda: 0.0, mono=mono, context=context
    )
    try:
        yield http
    finally:
        await http.close()
        transport.close()


def answer_one(listening: socket.socket, context: ssl.SSLContext) -> None:
    """Answer a connection as OpenSSL's own server does, with an alert where the handshake fails (asyncio's just leaves)."""
    listening.settimeout(30)
    plain, _ = listening.accept()
    plain.settimeout(30)
    with plain, contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
        connection.recv(65536)
        connection.sendall(OK)
        connection.recv(1)


def post(server: Server, context: ssl.SSLContext, times: int = 1) -> tuple[list[Outcome], Receiver]:
    async def go() -> tuple[list[Outcome], Receiver]:
        async with Receiver(context=server.context) as receiver, named(context) as http:
            url = f"https://{NAME}:{receiver.port}/hook"
            return [await http.send(request(url)) for _ in range(times)], receiver

    return asyncio.run(go())


def test_a_bundle_of_your_own_is_trusted_and_the_name_is_asked_for(
    authority: trustme.CA, ca_file: str
) -> None:
    server = Server(authority, NAME)
    outcomes, receiver = post(server, tls_context(ca_file), times=2)
    assert [(o.status, o.reused) for o in outcomes] == [(200, False), (200, True)]
    # the address was dialled, and the name stands where it belongs
    assert server.asked == [NAME]
    assert {c.headers["host"] for c in receiver.calls} == {f"{NAME}:{receiver.port}"}


def test_without_it_the_same_certificate_is_refused(authority: trustme.CA) -> None:
    outcomes, receiver = post(Server(authority, NAME), tls_context(""))
    assert outcomes[0].kind is OutcomeKind.TLS_FAILED
    assert outcomes[0].reason.startswith("the certificate is not accepted")
    assert receiver.calls == []


def test_a_bundle_stands_instead_of_the_systems(ca_file: str) -> None:
    assert len(tls_context(ca_file).get_ca_certs()) == 1


@pytest.mark.parametrize("names", [["127.0.0.1"], ["other.example.com"], ["*.hooks.example.com"], ["*.com"]])
def test_a_certificate_for_the_address_or_for_another_name_is_none(
    authority: trustme.CA, ca_file: str, names: list[str]
) -> None:
    outcomes, receiver = post(Server(authority, *names), tls_context(ca_file))
    assert outcomes[0].kind is OutcomeKind.TLS_FAILED
    assert outcomes[0].reason == "the certificate is not accepted: it is for another name"
    assert receiver.calls == []


def test_an_expired_certificate_is_refused(authority: trustme.CA, ca_file: str) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    outcomes, receiver = post(Server(authority, NAME, not_after=yesterday), tls_context(ca_file))
    assert outcomes[0].reason == "the certificate is not accepted: it has expired"
    assert receiver.calls == []


@pytest.mark.parametrize("version", [V.TLSv1_2, V.TLSv1_3])
def test_tls_1_2_is_enough(authority: trustme.CA, ca_file: str, version: V) -> None:
    outcomes, _ = post(Server(authority, NAME, most=version), tls_context(ca_file))
    assert outcomes[0].status == 200


def test_tls_1_1_is_refused(authority: trustme.CA, ca_file: str) -> None:
    server = Server(authority, NAME, most=V.TLSv1_1).context

    def called(context: ssl.SSLContext) -> Outcome:
        async def go() -> Outcome:
            with socket.create_server(("127.0.0.1", 0)) as listening:
                serving = asyncio.create_task(asyncio.to_thread(answer_one, listening, server))
                async with named(context) as http:
                    port = listening.getsockname()[1]
                    outcome = await http.send(request(f"https://{NAME}:{port}/"))
                await serving
                return outcome

        return asyncio.run(go())

    outcome = called(tls_context(ca_file))
    assert (outcome.kind, outcome.reason) == (OutcomeKind.TLS_FAILED, "the TLS handshake failed")
    assert not outcome.sent
    # it is the version that stands in the way, where the library speaks it at all
    lenient = tls_context(ca_file)
    old(lenient, V.TLSv1_1)
    if called(lenient).status != 200:
        pytest.skip("this OpenSSL has no TLS 1.1: there is nothing to refuse")


def test_no_redirect_leads_from_https_to_http(authority: trustme.CA, ca_file: str) -> None:
    async def go() -> None:
        async with Receiver() as plain:
            astray = always(answer(307, location=f"http://{NAME}:{plain.port}/"))
            for redirects in ("any", "same-host"):
                async with (
                    Receiver(astray, context=Server(authority, NAME).context) as receiver,
                    named(tls_context(ca_file), redirects=redirects) as http,
                ):
                    outcome = await http.send(request(f"https://{NAME}:{receiver.port}/"))
                    assert outcome.status == 307
                    assert outcome.reason == "a redirect from https to http is not followed"
            assert plain.connections == 0

    asyncio.run(go())


@pytest.mark.parametrize(
    "content", ["", "junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_bundle_without_certificates_is_refused_with_the_configuration(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "ca.pem"
    path.write_text(content)
    with pytest.raises(ConfigInvalid) as raised:
        parse(f'[network]\nca_file = "{path}"\n', "config.toml", {})
    (mistake,) = raised.value.mistakes
    assert str(mistake).startswith("config.toml:2: network.ca_file: ")
    assert "PEM" in mistake.message
