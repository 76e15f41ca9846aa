"""``hookd listen``: a receiver for development."""

from __future__ import annotations

import asyncio
import datetime
import json
import random
import signal
import time
from typing import TYPE_CHECKING

import click

from hookd.commands.session import Failed, given_secret, options
from hookd.config import duration

if TYPE_CHECKING:
    from hookd.commands import Invocation
    from hookd.net.receiver import Received

BODY_SHOWN = 300


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="0 takes any.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--secret", "secrets", multiple=True, envvar="HOOKD_SECRET", metavar="S", help="Check signatures with it (whsec_…, whpk_…, @FILE); may be repeated; else $HOOKD_SECRET.")  # fmt: skip
@click.option("--forward-to", default="", metavar="URL", help="Hand requests on, and its answer back.")
@click.option(
    "--fail", type=click.FloatRange(0, 1), default=0.0, metavar="RATE", help="Answer this share with 500."
)
@click.option("--delay", default="0s", metavar="D", help="Answer after so long: 250ms, 2s.")
@click.option(
    "--status", type=click.IntRange(200, 599), default=200, show_default=True, help="Answer with it."
)
@options
@click.pass_obj
def listen(
    invocation: Invocation, port: int, host: str, secrets: tuple[str, ...], forward_to: str, fail: float,
    delay: str, status: int,
) -> None:  # fmt: skip
    """
    A receiver for development: print and verify what arrives, and hand it on.

    \b
    hookd listen --port 9000 --secret whsec_…
    hookd endpoint add http://127.0.0.1:9000/

    It answers the challenges of `hookd endpoint verify`, unless it hands requests on.
    """  # noqa: D301 - click's mark for lines that stay
    from hookd.core.signing import parse_checking  # noqa: PLC0415 - not for --help
    from hookd.net.receiver import Manners, Receiver  # noqa: PLC0415

    try:
        delay_s = duration(delay)
        secrets = tuple(given_secret(secret) or "" for secret in secrets)
        for secret in secrets:
            parse_checking(secret)
    except ValueError as error:
        raise Failed(str(error), 2) from None
    manners = Manners(status, fail, delay_s, forward_to=forward_to)
    printer = _json_line if invocation.json else _line
    dice = random.Random()  # noqa: S311 - decides which request fails

    async def serve() -> None:
        receiver = Receiver(manners, secrets, printer, wall=time.time, draw=dice.random)
        try:
            listening = await receiver.start(port, host)
        except OSError as error:
            raise Failed(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
        click.echo(f"listening on http://{host}:{listening}/  (Ctrl-C stops)", err=True)
        if not secrets:
            click.echo("signatures are not checked: give --secret", err=True)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        await receiver.stop()

    asyncio.run(serve())


def _line(received: Received) -> None:
    headers = {k.lower(): v for k, v in received.headers.items()}
    signed = {None: "not checked", True: "signature ok", False: f"BAD SIGNATURE: {received.problem}"}[
        received.signed
    ]
    body = received.body[:BODY_SHOWN].decode("utf-8", "replace")
    click.echo(
        f"{datetime.datetime.now():%H:%M:%S}  {received.status}  {received.path}  {headers.get('webhook-id', '-')}  "  # noqa: DTZ005 - for whoever sits here
        f"attempt {headers.get('hookd-attempt', '-')}  {signed}"
        + (f"  -> {received.forwarded_to}" if received.forwarded_to else "")
    )
    # what came from outside must not play with the terminal
    click.echo(
        "  "
        + "".join(c if c.isprintable() else "\ufffd" for c in body)
        + ("…" if len(received.body) > BODY_SHOWN else "")
    )


def _json_line(received: Received) -> None:
    click.echo(
        json.dumps({
            "path": received.path, "status": received.status, "signed": received.signed,
            "problem": received.problem or None, "headers": received.headers,
            "body": received.body.decode("utf-8", "replace"),
        })
    )  # fmt: skip
