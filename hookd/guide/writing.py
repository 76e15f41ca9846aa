"""
The documentation as Markdown, page by page.

The texts are in ``text/``: ``{{name}}`` is a value, ``{{#name}}…{{/name}}`` a part that is there only where there is such
a value, ``{{snippet FILE TITLE}}`` a file of ``snippets/``.  What comes from the database or ``events.toml`` is escaped here,
once, so that neither Markdown nor HTML made of it can be anything but text.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hookd.config import ASK_AGAIN_SHARE
from hookd.core.model import BodyFormat
from hookd.core.words import span
from hookd.guide.catalogue import types_of
from hookd.guide.sample import EXAMPLE_SECRET, sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hookd.config import Config
    from hookd.guide.catalogue import Catalogue, Described

FIELDS_DEEP = 6

EXAMPLE_PAYLOAD = '{"order": 17}'
EXAMPLE_TYPE = "order.paid"

ENVELOPES = {
    BodyFormat.STANDARD: "`data` is the payload, `timestamp` when it happened.",
    BodyFormat.RAW: "The body is the payload alone; its type is not sent along, so register a URL for each.",
    BodyFormat.CLOUDEVENTS: "The body is a [CloudEvents 1.0](https://cloudevents.io) event; `data` is the payload.",
    BodyFormat.THIN: "The body has no data: [fetch it](answer.md#thin-events) from `url`.",
}

REDIRECTS = {
    "never": "a failure: register the new URL instead",
    "same-host": "followed on the same host only, and only 307 and 308; else a failure: register the new URL instead",
    "any": "followed where it is 307 or 308; else a failure: register the new URL instead",
}


@dataclass(frozen=True, slots=True)
class Page:
    """A page: its name without ending, its title, and its text."""

    name: str
    title: str
    markdown: str
    deprecated: bool = False


def write(config: Config, catalogue: Catalogue, *, for_everybody: bool = False) -> list[Page]:
    """All pages, in the order in which they are read."""
    values = _values(config, catalogue, for_everybody=for_everybody)
    pages = [
        Page("overview", "In short", _filled("overview.md", values)),
        Page("verify", "Check the signature", _filled("verify.md", values)),
        Page("answer", "What to answer", _filled("answer.md", values)),
    ]
    described = list(types_of(catalogue))
    if described:
        names = _names(described)
        pages.append(Page("events", "Events", _events(described, names)))
        pages += [
            Page(names[one.type], one.type, _event(one, config), bool(one.text.deprecated))
            for one in described
        ]
    if catalogue.changes:
        pages.append(Page("changelog", "Changes", _changes(catalogue, dict(_names(described)))))
    if for_everybody:
        pages.append(Page("try", "Try it", _filled("try.md", values)))
    return pages


def one_file(pages: list[Page], heading: str, introduction: str = "") -> str:
    """All pages as one, whose links stay within it."""
    anchors = {page.name: slug(_first_heading(page.markdown)) for page in pages}

    def here(match: re.Match[str]) -> str:
        return f"](#{match[2] or anchors.get(match[1], match[1])})"

    parts = [re.sub(r"\]\(([\w./%-]+)\.md(?:#([\w-]+))?\)", here, page.markdown).strip() for page in pages]
    text = "\n\n".join([f"# {heading}", *([introduction] if introduction else []), *parts]) + "\n"
    # a title of a block is for tabs
    return re.sub(r"^(`{3,})(\w+) \| (.+)$", r"\3:\n\n\1\2", text, flags=re.MULTILINE)


# What the texts leave open.


def _values(config: Config, catalogue: Catalogue, *, for_everybody: bool) -> dict[str, str]:
    described = min(
        types_of(catalogue), key=lambda e: (bool(e.text.deprecated), e.example is None), default=None
    )
    type_ = described.type if described else EXAMPLE_TYPE
    payload = (described.example if described else None) or EXAMPLE_PAYLOAD
    shown = sample(type_, payload, config)
    delivery, retry, head = config.delivery, config.retry, catalogue.head
    thin = delivery.thin_url or ("https://api.example.com/events/{event_id}" if for_everybody else "")
    fetched = thin.replace("{event_id}", "01a2…") + ("&" if "?" in thin else "?") + "expires=…&signature=…"
    return {
        "request": fence(shown.text, "http"),
        "envelope": ENVELOPES[BodyFormat(delivery.format)],
        "example_secret": EXAMPLE_SECRET,
        "example_id": str(shown.id),
        "example_timestamp": str(shown.timestamp),
        "example_signature": shown.signature,
        "timeout": length(delivery.timeout),
        "connect_timeout": length(delivery.connect_timeout),
        "max_response": _bytes(delivery.max_response),
        "redirects": REDIRECTS[delivery.redirects],
        "retries": _retries(retry.schedule, retry.jitter),
        "schedule": _schedule(retry.schedule),
        "disable_after": length(retry.disable_after),
        "asked_again": length(retry.disable_after * ASK_AGAIN_SHARE),
        "thin": thin,
        "thin_url": json.dumps(fetched, ensure_ascii=False)[1:-1] if thin else "",
        "contact": prose(head.contact),
        "addresses": "\n".join(f"- {code(address)}" for address in head.addresses),
        "own": "yes" if for_everybody else "",
    }


def _retries(schedule: list[float], jitter: float) -> str:
    if not schedule:
        return "There is one attempt and no retry: ask your sender to replay what failed."
    about = f", give or take {jitter:.0%}" if jitter else ""
    return f"A failed attempt is made again up to {len(schedule)} times{about}, for {length(sum(schedule))} in all; then it is given up."


def _schedule(schedule: list[float]) -> str:
    if not schedule:
        return ""
    rows = ["| attempt | comes | after the first |", "| --- | --- | --- |", "| 1 | at once | |"]
    total = 0.0
    for number, delay in enumerate(schedule, 2):
        total += delay
        rows.append(f"| {number} | {length(delay)} later | {length(total)} |")
    return "\n".join(rows)


def length(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 1 or (seconds < 10 and seconds != int(seconds)):
        return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:g} s"
    return span(seconds)


def _bytes(size: int) -> str:
    for factor, unit in ((1024**2, "MiB"), (1024, "KiB")):
        if size >= factor and size % factor == 0:
            return f"{size // factor} {unit}"
    return f"{size:,} bytes"


@lru_cache
def text_of(name: str) -> str:
    """A file of this package."""
    return files("hookd.guide").joinpath(name).read_text(encoding="utf-8")


def _filled(name: str, values: Mapping[str, str]) -> str:
    text = text_of(f"text/{name}")
    text = re.sub(
        r"\{\{#(\w+)\}\}(.*?)\{\{/\1\}\}", lambda m: m[2] if values[m[1]] else "", text, flags=re.DOTALL
    )
    text = re.sub(r"\{\{snippet (\S+) (.+)\}\}", lambda m: _snippet(m[1], m[2]), text)
    return re.sub(r"\{\{(\w+)\}\}", lambda m: values[m[1]], text)


def _snippet(name: str, title: str) -> str:
    return fence(text_of(f"snippets/{name}").rstrip(), f"{name.rpartition('.')[2]} | {title}")


# Events.


def _names(described: list[Described]) -> dict[str, str]:
    """A file name for each type: whatever is in a type, it stays in its folder and is nobody else's."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for one in described:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", one.type).strip(".")[:100] or "event"
        for number in itertools.count(1):
            name = plain if number == 1 else f"{plain}-{number}"
            if name.lower() not in taken:
                break
        taken.add(name.lower())
        names[one.type] = f"events/{name}"
    return names


def _events(described: list[Described], names: Mapping[str, str]) -> str:
    rows = ["## Events", "", "| type | sent when |", "| --- | --- |"]
    for one in described:
        note = " (deprecated)" if one.text.deprecated else ""
        rows.append(
            f"| [{code(one.type, cell=True)}]({names[one.type]}.md) | {_cell(one.text.summary)}{note} |"
        )
    return (
        "\n".join(rows) + "\n\nSubscribe to one type, to `user.*` (all that begin with `user.`), or to `*`.\n"
    )


def _event(one: Described, config: Config) -> str:
    parts = [f"## {code(one.type)}"]
    if one.text.deprecated:
        parts.append(f"**Deprecated.** {inline(one.text.deprecated)}")
    if one.text.summary:
        parts.append(inline(one.text.summary))
    if one.text.description:
        parts.append(prose(one.text.description))
    if one.schema is not None:
        table = _fields(one.schema)
        if table:
            parts += ["### Payload", table]
    if one.example is not None:
        shown = sample(one.type, one.example, config)
        parts += ["### Example", fence(shown.text, "http"), _sending(shown.head, shown.body)]
    return "\n\n".join(parts) + "\n"


def _sending(head: str, body: bytes) -> str:
    """The example as a command that sends it to a receiver that is being written."""
    kept = ("content-type", "webhook-id", "webhook-timestamp", "webhook-signature", "hookd-attempt")
    lines = [line for line in head.split("\n")[1:] if line.partition(":")[0] in kept]
    options = " \\\n".join(f"  -H {shlex.quote(line)}" for line in lines)
    data = body.decode("utf-8", "replace")
    # curl takes a leading @ for a file
    command = f"curl http://localhost:3000/hooks \\\n{options} \\\n  --data-raw {shlex.quote(data)}"
    return (
        f"Send it to what you are writing. It is signed with {code(EXAMPLE_SECRET)}; its time is fixed, so a check that "
        f"refuses old requests refuses it:\n\n{fence(command, 'sh')}"
    )


def _fields(schema: Mapping[str, Any]) -> str:
    rows = [
        f"| {code(path, cell=True)} | {_kind(field_schema)}{', required' if required else ''} | {_meaning(field_schema)} |"
        for path, field_schema, required in _walk(schema, schema, "", 0)
    ]
    return "\n".join(["| field | type | |", "| --- | --- | --- |", *rows]) if rows else ""


def _walk(
    root: Mapping[str, Any], schema: Any, path: str, depth: int
) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    schema = _resolved(root, schema)
    properties = schema.get("properties")
    if not isinstance(properties, dict) or depth >= FIELDS_DEEP:
        return
    required = schema.get("required")
    for name, given in properties.items():
        inner = _resolved(root, given)
        at = f"{path}{name}"
        yield at, inner, isinstance(required, list) and name in required
        yield from _walk(root, inner, f"{at}.", depth + 1)
        items = _resolved(root, inner.get("items"))
        if items:
            yield from _walk(root, items, f"{at}[].", depth + 1)


def _resolved(root: Mapping[str, Any], schema: Any) -> Mapping[str, Any]:
    """A schema, or what it refers to within the same document."""
    for _ in range(10):
        if not isinstance(schema, dict):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        found: Any = root
        for step in reference[2:].split("/"):
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        schema = found
    return {}


KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}


def _kind(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("type", "")
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if not kinds and isinstance(values, list):
        kinds = sorted({KINDS.get(type(value), "null") for value in values})
    said = " or ".join(map(str, kinds)) if isinstance(kinds, list) else str(kinds)
    if isinstance(schema.get("format"), str):
        said += f" ({schema['format']})"
    return escape(said or "any")


def _meaning(schema: Mapping[str, Any]) -> str:
    said = [escape(str(schema["description"]))] if schema.get("description") else []
    if "const" in schema:
        said.append(f"always {code(json.dumps(schema['const']), cell=True)}")
    if isinstance(schema.get("enum"), list):
        said.append(
            "one of " + ", ".join(code(json.dumps(v, ensure_ascii=False), cell=True) for v in schema["enum"])
        )
    bounds = {
        "minimum": "at least",
        "maximum": "at most",
        "minLength": "at least, characters:",
        "maxLength": "at most, characters:",
    }
    said += [f"{words} {escape(str(schema[key]))}" for key, words in bounds.items() if key in schema]
    return "; ".join(said)


def _changes(catalogue: Catalogue, names: Mapping[str, str]) -> str:
    parts = ["## Changes"]
    for date, changes in itertools.groupby(catalogue.changes, key=lambda change: change.date):
        parts.append(f"### {date.isoformat()}")
        for change in changes:
            types = ", ".join(f"[{code(t)}]({names[t]}.md)" for t in change.types if t in names)
            parts.append(f"{types}: {prose(change.text)}" if types else prose(change.text))
    return "\n\n".join(parts) + "\n"


# Markdown.


def escape(text: str) -> str:
    """A text that is only text, on one line."""
    one_line = " ".join(text.split())
    escaped = re.sub(r"([\\`*_\[\]<>&|#~])", r"\\\1", one_line)
    # at the beginning of a line these would be a list
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", escaped)


KEPT = re.compile(r"(`[^`\n]+`|\[[^\[\]`\n]+\]\(https?://[^\s()<>]+\))")


def prose(text: str) -> str:
    """A text of paragraphs, in which `code`, [links](https://…) and lists are kept, and nothing else is more than text."""
    blocks = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = [
            f"- {inline(line.strip()[2:])}" if line.strip().startswith(("- ", "* ")) else inline(line)
            for line in paragraph.splitlines()
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def inline(line: str) -> str:
    """One line of ``prose``."""
    parts = KEPT.split(line.strip())
    said = ""
    for n, part in enumerate(parts):
        if n % 2 == 0:
            said += _between(part)
        elif part.startswith("`"):
            said += part
        else:
            label, _, target = part[1:-1].rpartition("](")
            if said.endswith("!"):
                # it would be a picture, loaded from elsewhere
                said = said[:-1] + "\\!"
            said += f"[{escape(label)}]({target})"
    return said


def _cell(line: str) -> str:
    """The same within a table, where a | that is left, in code, would end the cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", inline(line))


def _between(text: str) -> str:
    """As ``escape``, with the blanks at its ends."""
    before, after = text[:1] == " ", text[-1:] == " " and text.strip() != ""
    return f"{' ' if before else ''}{escape(text)}{' ' if after else ''}"


def code(text: str, *, cell: bool = False) -> str:
    """A code span; within the ``cell`` of a table a | needs a backslash."""
    text = " ".join(text.split()) or " "
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    said = f"{ticks}{padding}{text}{padding}{ticks}"
    return said.replace("|", "\\|") if cell else said


def fence(text: str, info: str = "") -> str:
    """A block of code."""
    ticks = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks}{info}\n{text}\n{ticks}"


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    plain = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", ""))
    return plain.strip().replace(" ", "-")


def _first_heading(markdown: str) -> str:
    line = next((line for line in markdown.splitlines() if line.startswith("#")), "")
    return line.lstrip("# ")
