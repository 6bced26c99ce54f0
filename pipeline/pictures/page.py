"""HTML pages that need no other file: their style, and tables.

A page follows the reader's light or dark theme, and is readable from the width of a phone on.
"""

import html
import re
from collections.abc import Iterable, Sequence

# Nothing is wider than the window: pictures shrink, long words break, tables and settings scroll inside a box. In the
# dark theme the brightness of pictures is inverted, and hues stay. The brightness of the heat map has a meaning.
STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --box: #f5f5f5; --accent: #2166ac;
        --mark: #ffd9a8; }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --page: #16181b; --line: #3a3d42; --box: #22252a;
        --accent: #7fb2e5; --mark: #7a4a12; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2em auto; padding: 0 1em; color: var(--text);
       background: var(--page); overflow-wrap: break-word; }
a { color: var(--accent); }
h2 { margin-top: 2em; border-bottom: 2px solid var(--accent); }
.table, pre { max-width: 100%; overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; } td, th { border-bottom: 1px solid var(--line); padding: .25em .6em; }
th:first-child { text-align: left; } td + td, th + th { text-align: right; } th, pre { background: var(--box); }
.facts td + td { text-align: left; }
td:first-child { position: sticky; left: 0; background: var(--page); }
img { display: block; max-width: 100%; height: auto; margin: .6em 0; background: #fff; } pre { padding: 1em; }
figure { margin: 1.5em 0; } figcaption, .note { opacity: .8; }
mark { background: var(--mark); color: inherit; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20em), 1fr)); gap: 0 1.5em; }
.sample { border-left: 3px solid var(--line); padding-left: .8em; margin: .5em 0 1.2em; white-space: pre-wrap; }
@media (max-width: 650px) { body { font-size: 13px; } td, th { padding: .25em .4em; } }
@media (prefers-color-scheme: dark) { img { filter: invert(.91) hue-rotate(180deg); }
        img[alt^="site_quality"] { filter: brightness(.85); } }
"""


def format_page(title: str, parts: Sequence[str], style: str = "") -> str:
    """Return a page as HTML.

    Args:
        title: escaped text.
        parts: HTML of the body.
        style: CSS in addition to the CSS of all pages.
    """
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    opening = f'<!doctype html><meta charset="utf-8">{viewport}<title>{title}</title><style>{STYLE}{style}</style>'
    return "\n".join([opening, *parts, ""])


def format_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table that scrolls inside its own box. Cells are escaped."""
    head = "".join(f"<th>{format_cell(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{format_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def format_cell(text: str) -> str:
    """Return an escaped text whose names may break after `_` and `/` in a narrow window."""
    return re.sub(r"(?<=\w)([_/])(?=\w)", r"\1<wbr>", html.escape(text))
