"""``hookd docs``: documentation for those who receive."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookd.commands import completing
from hookd.commands.session import Failed, options, print_json, with_connection
from hookd.config import load

if TYPE_CHECKING:
    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.guide.catalogue import Catalogue
    from hookd.postgres.seen import Seen

FOLDER = "webhook-docs"
CATALOGUE = "events.toml"

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
"""A key of a payload that is a name; others may be data."""

KEYS_MOST = 50
SHAPE_DEEP = 8


@click.command()
@click.option(
    "--output",
    metavar="DIR",
    default=FOLDER,
    show_default=True,
    help="Where to; - prints Markdown or OpenAPI.",
)
@click.option("--format", "form", type=click.Choice(["site", "markdown", "openapi"]), default="site", show_default=True, help="HTML pages, one Markdown file, or an OpenAPI document.")  # fmt: skip
@click.option("--catalogue", metavar="FILE", help=f"Titles, descriptions, schemas, examples; default: ./{CATALOGUE}, where it is.")  # fmt: skip
@click.option(
    "--tenant",
    shell_complete=completing.tenants,
    help="Show what concerns this tenant only; default: everything.",
)
@click.option("--payloads", type=click.Choice(["shape", "real", "none"]), default="shape", show_default=True, help="Of events without an example: the newest payload with its values blanked, as it is, or nothing.")  # fmt: skip
@click.option("--offline", is_flag=True, help="Ask no database: the catalogue only.")
@click.option("--example", is_flag=True, help="Print an example of the catalogue, and do nothing else.")
@options
@click.pass_obj
def docs(
    invocation: Invocation, output: str, form: str, catalogue: str | None, tenant: str | None, payloads: str,
    *, offline: bool, example: bool,
) -> None:  # fmt: skip
    """
    Write documentation for receivers: what is sent, how to check and answer it, every event with an example.

    It comes from the configuration, from the types of the newest events in the database, and from the catalogue.  The site
    is plain files without scripts, to be put on any web server or opened as they are.

    \b
    hookd docs --example > events.toml
    """  # noqa: D301 - click's mark for lines that stay
    from hookd.guide import writing  # noqa: PLC0415 - not for --help

    if example:
        click.echo(writing.text_of("text/events.toml"), nl=False)
        return
    if form == "site" and output == "-":
        raise Failed("a site has several files: give --output DIR, or --format markdown", 2)
    config = load(invocation.config_file).config
    told = _catalogue(catalogue).for_tenant(tenant)
    if not offline:
        told = _with_seen(told, _seen(invocation, tenant, config), payloads)
    files = _files(config, told, form)
    if output == "-":
        click.echo(next(iter(files.values())), nl=False)
        return
    folder = Path(output)
    written = _write(folder, files)
    if invocation.json:
        print_json({"folder": str(folder), "files": written, "events": len(told.events)})
    else:
        click.echo(f"{folder / written[0]}: {len(told.events)} events, {len(written)} files")


def _catalogue(given: str | None) -> Catalogue:
    try:
        from hookd.guide.catalogue import Catalogue, read_catalogue  # noqa: PLC0415 - not for --help
    except ModuleNotFoundError as missing:
        raise Failed(f"{missing.name} is not installed; run: pip install 'hookd[docs]'") from None
    if given is not None:
        return read_catalogue(Path(given))
    return read_catalogue(Path(CATALOGUE)) if Path(CATALOGUE).is_file() else Catalogue()


def _seen(invocation: Invocation, tenant: str | None, _config: Config) -> list[Seen]:
    from hookd.postgres.seen import seen  # noqa: PLC0415 - not for --help

    async def work(connection: asyncpg.Connection, _config: Config) -> list[Seen]:
        return await seen(connection, tenant)

    return with_connection(invocation, work)


def _with_seen(told: Catalogue, found: list[Seen], payloads: str) -> Catalogue:
    """What the catalogue tells, and the events that it does not know."""
    from hookd.guide.catalogue import SECRET, Described  # noqa: PLC0415 - not for --help
    from hookd.guide.catalogue import Catalogue as All  # noqa: PLC0415

    events = dict(told.events)
    for one in found:
        known = events.get(one.type, Described(one.type))
        example = known.example
        if example is None and one.payload is not None and payloads != "none":
            shown = (
                one.payload
                if payloads == "real"
                else json.dumps(shape(json.loads(one.payload)), ensure_ascii=False)
            )
            example = SECRET.sub("whsec_…", shown)
        events[one.type] = Described(known.type, known.text, example, known.schema)
    return All(told.head, events, told.changes)


def shape(value: Any, deep: int = 0) -> Any:
    """A payload without what it says: its names and kinds only."""
    if deep > SHAPE_DEEP:
        return None
    match value:
        case dict():
            names = [key for key in value if KEY.fullmatch(key)][:KEYS_MOST]
            return {key: shape(value[key], deep + 1) for key in names}
        case list():
            return [shape(value[0], deep + 1)] if value else []
        case bool():
            return True
        case int() | float():
            return 0
        case str():
            return "…"
    return None


def _files(config: Config, told: Catalogue, form: str) -> dict[str, str]:
    """What is written, by path; the first one is where to begin."""
    from hookd.guide import openapi, writing  # noqa: PLC0415 - not for --help
    from hookd.guide.site import site  # noqa: PLC0415

    described = json.dumps(openapi.document(config, told), indent=2, ensure_ascii=False) + "\n"
    if form == "openapi":
        return {"openapi.json": described}
    pages = writing.write(config, told)
    introduction = writing.prose(told.head.introduction)
    if form == "markdown":
        return {"webhooks.md": writing.one_file(pages, writing.escape(told.head.title), introduction)}
    made = site(pages, told.head.title, introduction)
    return {"index.html": made.pop("index.html"), **made, "openapi.json": described}


def _write(folder: Path, files: dict[str, str]) -> list[str]:
    """Write the files; pages of an earlier run that are not among them go."""
    try:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        if "index.html" in files:
            _remove_former(folder, set(files))
    except OSError as error:
        raise Failed(f"{error.filename or folder} cannot be written: {error.strerror}") from None
    return list(files)


def _remove_former(folder: Path, files: set[str]) -> None:
    from hookd.guide.site import GENERATOR  # noqa: PLC0415 - not for --help

    for page in [*folder.glob("*.html"), *folder.glob("events/*.html")]:
        ours = page.relative_to(folder).as_posix() in files
        if not ours and GENERATOR in page.read_text(encoding="utf-8", errors="replace"):
            page.unlink()
