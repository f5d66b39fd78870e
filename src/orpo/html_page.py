"""The frame of every page this package writes: self-contained, and forbidden to load anything."""

from __future__ import annotations

import re
from html import escape


def html_page(title: str, css: str, body: str) -> str:
    """A whole page.

    Args:
        title: Plain text.
        css: Its style sheet.
        body: HTML of its main part, already escaped.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def typeset(number: str) -> str:
    """With a minus sign before digits instead of a hyphen, and a dash for nothing."""
    return "\N{EN DASH}" if number == "-" else re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", number)
