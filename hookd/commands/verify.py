"""``hookd verify``."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from hookd.commands.session import STDIN, Failed, given_secret, options, print_json

if TYPE_CHECKING:
    from hookd.commands import Invocation


@click.command()
@click.option(
    "--secret",
    required=True,
    envvar="HOOKD_SECRET",
    metavar="S",
    help="@FILE, or whsec_… (which process lists show) or the public key whpk_… itself; else $HOOKD_SECRET.",
)
@click.option(
    "--tolerance",
    type=float,
    default=300,
    show_default=True,
    help="Seconds that the clocks may differ; 0: any age.",
)
@options
@click.pass_obj
def verify(invocation: Invocation, secret: str, tolerance: float) -> None:
    """
    Read a captured request on stdin and say whether its signature holds, or what is wrong with it.

    The request is headers, an empty line, and the body; a request line before the headers is skipped.
    """
    from hookd.core.signing import verify as check  # noqa: PLC0415 - not for --help

    if secret == STDIN:
        raise Failed("--secret -: stdin is the request; give the secret as @FILE or in $HOOKD_SECRET", 2)
    secret = given_secret(secret) or ""
    headers, body = _taken_apart(sys.stdin.buffer.read())
    report = check(secret, headers, body, time.time(), tolerance or 10**9)
    if not report.valid and body.endswith(b"\n"):
        # editors and echo add one
        trimmed = check(
            secret, headers, body.removesuffix(b"\n").removesuffix(b"\r"), time.time(), tolerance or 10**9
        )
        report = trimmed if trimmed.valid else report
    if invocation.json:
        print_json({"valid": report.valid, "explanation": report.explanation})
    else:
        click.echo(report.explanation)
    if not report.valid:
        raise click.exceptions.Exit(1)


def _taken_apart(captured: bytes) -> tuple[dict[str, str], bytes]:
    separator = b"\r\n\r\n" if b"\r\n\r\n" in captured else b"\n\n"
    head, found, body = captured.partition(separator)
    if not found:
        raise Failed("this is no request: headers, an empty line and the body are expected on stdin", 2)
    headers = {}
    for line in head.decode("latin-1").splitlines():
        name, colon, value = line.lstrip("> ").partition(":")
        if colon and " " not in name:
            headers[name] = value.strip()
    return headers, body
