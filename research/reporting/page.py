"""Parts of HTML pages: tables, pictures, sections, and the page around them, which opens offline, without other files."""

import base64
import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote


def image(png: bytes, name: str) -> str:
    """Returns a picture with a name for those who can't see it."""
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def figure(png: bytes, name: str, css_class: str = "") -> str:
    """Returns a picture above its name."""
    return f'<figure class="{css_class}">{image(png, name)}<figcaption>{html.escape(name)}</figcaption></figure>'


def link(target: Path, start: Path, text: str) -> str:
    """Returns a link relative to `start`; only the text if the target does not exist."""
    if not target.exists():
        return html.escape(text)
    return f'<a href="{quote(os.fsencode(os.path.relpath(target, start)))}">{html.escape(text)}</a>'


def status(status: Any) -> str:
    """Returns how a run or a trial ended, in a colour that says so."""
    css_class = "good" if status == "finished" else "bad" if status == "failed" else "open"
    return f'<span class="status {css_class}">{html.escape(str(status))}</span>'


def section(title: str, *parts: str) -> str:
    """Returns parts under a title; nothing if all of them are empty."""
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if any(parts) else ""


def columns(*parts: str) -> str:
    """Returns parts beside each other where there is room."""
    return f'<div class="columns">{"".join(parts)}</div>' if any(parts) else ""


def text(value: Any) -> str:
    """Returns a value as HTML.

    >>> text(0.123456), text(12345), text("a < b"), text(None)
    ('0.1235', '12,345', 'a &lt; b', '')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return "" if value is None else html.escape(value if isinstance(value, str) else json.dumps(value))


def facts(values: Mapping[str, Any]) -> str:
    """Returns a table of names and values."""
    return pairs([(name, text(value)) for name, value in values.items()])


def pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns a table of names, which are text, and what belongs to them, which is HTML."""
    return "<table>" + "".join(f"<tr><th>{html.escape(name)}</th><td>{value}</td></tr>" for name, value in pairs) + "</table>"


def rows(row_titles: Mapping[str, str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table with titles of rows, which are HTML, and of columns, which are text."""
    header = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{title}</th>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for title, row in zip(row_titles.values(), rows, strict=True)
    )
    return f'<div class="wide"><table><tr><th></th>{header}</tr>{body}</table></div>'


def render(title: str, parts: Iterable[str]) -> str:
    """Returns a complete page, which needs no other file."""
    return _PAGE.format(title=html.escape(title), parts="".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2.5rem auto; max-width: 76rem; padding: 0 1.5rem; color: #1b1f24; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .25rem; }} h2 {{ font-size: 1rem; margin: 2.2rem 0 .6rem; color: #57606a; }}
.status {{ display: inline-block; padding: .05rem .6rem; border-radius: 1rem; }}
.good {{ background: #eaf3ea; color: #1a6b2d; }} .bad {{ background: #fbeaea; color: #a3221a; }}
.open {{ background: #fdf4dc; color: #7a5200; }}
table {{ border-collapse: collapse; }} th, td {{ text-align: left; padding: .2rem 1.4rem .2rem 0; vertical-align: top; }}
.numbers td {{ white-space: nowrap; }}
th {{ font-weight: 500; color: #57606a; white-space: nowrap; }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 4rem; }}
tr + tr {{ border-top: 1px solid #eaeef2; }} b {{ font-weight: 700; }} code {{ font-size: .9em; }} a {{ color: inherit; }}
i {{ display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .5rem; vertical-align: -1px; }}
img {{ max-width: 100%; }} figure {{ margin: 1rem 0; }} figcaption, p {{ color: #57606a; font-size: .85rem; }}
.wide, .strip {{ overflow-x: auto; }} .strip {{ display: flex; gap: 1rem; }} .strip figure {{ flex: none; margin: 0 0 .5rem; }}
.strip img {{ max-width: none; height: 15rem; }} .tall img {{ max-height: 60rem; }}
.columns {{ display: flex; flex-wrap: wrap; gap: 0 5rem; }}
</style></head><body>
<h1>{title}</h1>
{parts}
</body></html>
"""
