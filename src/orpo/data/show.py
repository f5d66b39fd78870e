"""A pair as the model reads it: every token, what the NLL is over and what the odds are over.

`lay_out` cuts a tokenized pair into segments of one role each; terminal and page draw the same segments, so
neither can show what the other does not. No character is hidden: special tokens stand out, and newlines,
control characters and blanks at the edge of a segment have signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any

from orpo.data.one_row import OneRow
from orpo.html_page import html_page
from orpo.pairs import TokenizedPair

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class Role(StrEnum):
    """What a token stands for in the loss; the value is what a reader sees."""

    NONE = "not trained"
    NLL = "NLL"
    ODDS = "odds"
    BOTH = "NLL + odds"


_MEANINGS = {
    Role.NONE: "context: the loss has no term for these tokens",
    Role.NLL: "the NLL is over these tokens: they become likelier",
    Role.BOTH: "the NLL, and the odds of this side, are over these tokens",
    Role.ODDS: "the odds of this side are over these tokens, against those of the other",
}
_STYLES = {Role.NONE: "dim", Role.NLL: "cyan", Role.BOTH: "green", Role.ODDS: "yellow"}
_SIGNS = {"\n": "⏎\n", "\r": "␍", "\t": "⇥   "}
_BLANK, _JOINERS = "␣", "\u200c\u200d"
_OTHER_SIGNS = f"⏎ newline, {_BLANK} blank at an edge"
_INDENT = 12
"""Cells of a label and the blank behind it."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token as text, or the few that only together make a character.

    Attributes:
        text: Exactly what decoding gives.
        ids: Its id, or their ids.
        is_special: Whether it is an added token (`<|im_end|>`), not a piece of text.
    """

    text: str
    ids: tuple[int, ...]
    is_special: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one role."""

    role: Role
    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        """What decoding gives."""
        return "".join(token.text for token in self.tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens as the model counts them."""
        return sum(len(token.ids) for token in self.tokens)


@dataclass(frozen=True, slots=True)
class Part:
    """The prompt or one of the sides."""

    name: str
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """What decoding gives."""
        return "".join(segment.text for segment in self.segments)

    def num_tokens(self, *roles: Role) -> int:
        """Tokens, of these roles only where any are given."""
        return sum(one.num_tokens for one in self.segments if not roles or one.role in roles)

    @property
    def title(self) -> str:
        """Name and numbers of tokens."""
        number = self.num_tokens()
        nll, odds = self.num_tokens(Role.NLL, Role.BOTH), self.num_tokens(Role.ODDS, Role.BOTH)
        parts = [f"{self.name}: {number:,} token{'' if number == 1 else 's'}"]
        parts += [f"{nll:,} in the NLL"] if nll else []
        parts += [f"{odds:,} in the odds"] if odds else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Layout:
    """A pair, cut into segments.

    Attributes:
        prompt: What both sides share.
        chosen: The rest of the chosen side.
        rejected: The rest of the rejected side; None for a row that trains the NLL alone.
    """

    prompt: Part
    chosen: Part
    rejected: Part | None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those there are, in order."""
        return (self.prompt, self.chosen) + ((self.rejected,) if self.rejected else ())


def lay_out(
    pair: TokenizedPair, tokenizer: Any, nll: Sequence[tuple[int, int]], *, odds: bool = True
) -> Layout:
    """Cut a pair into segments of one role each.

    Args:
        pair: As it trains.
        tokenizer: Its ids are of.
        nll: Ranges [start, stop) of `prompt ++ chosen` that the NLL is over.
        odds: Whether the objective has an odds term.
    """
    start = len(pair.prompt)
    odds = odds and len(pair.rejected) > 0
    in_nll = {index for first, stop in nll for index in range(first, stop)}
    chosen = _segments(
        tokenizer, pair.prompt, pair.chosen, in_nll, start + pair.chosen_context if odds else None
    )
    rejected = _segments(
        tokenizer, pair.prompt, pair.rejected, set(), start + pair.rejected_context if odds else None
    )
    return Layout(
        Part("prompt", chosen[0]),
        Part("chosen", chosen[1]),
        Part("rejected", rejected[1]) if pair.rejected else None,
    )


def _segments(
    tokenizer: Any, prompt: Sequence[int], side: Sequence[int], nll: set[int], odds_from: int | None
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """The segments of the prompt and of a side, which are decoded together as the model reads them."""
    ids = [*prompt, *side]
    odds_from = len(ids) if odds_from is None else odds_from
    roles = [_role(index in nll, index >= odds_from) for index in range(len(ids))]
    cuts = {index for index in range(1, len(ids)) if roles[index] != roles[index - 1]} | {len(prompt)}
    before: list[tuple[Role, Token]] = []
    behind: list[tuple[Role, Token]] = []
    position = 0
    for token in _tokens(tokenizer, ids, cuts):
        (before if position < len(prompt) else behind).append((roles[position], token))
        position += len(token.ids)
    return _grouped(before), _grouped(behind)


def _role(in_nll: bool, in_odds: bool) -> Role:
    if in_nll:
        return Role.BOTH if in_odds else Role.NLL
    return Role.ODDS if in_odds else Role.NONE


def _grouped(tokens: list[tuple[Role, Token]]) -> tuple[Segment, ...]:
    groups = groupby(tokens, key=lambda pair: pair[0])
    return tuple(Segment(role, tuple(token for _, token in group)) for role, group in groups)


def _tokens(tokenizer: Any, ids: Sequence[int], cuts: set[int]) -> Iterator[Token]:
    """Ids as texts that joined are the decoded whole; `cuts` lie between two tokens in any case.

    A token is decoded behind the one before it: alone, some tokenizers would leave out its leading blank.
    """
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    context = done = 0
    for stop in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[context:stop])
        ends = stop == len(ids) or stop in cuts or ids[stop] in added
        if text.endswith("\ufffd") and not ends:
            continue  # the first bytes of a character
        known = _decode(tokenizer, ids[context:done])
        own = text[len(known) :] if text.startswith(known) else _decode(tokenizer, ids[done:stop])
        yield Token(own, tuple(ids[done:stop]), ids[stop - 1] in added)
        context, done = done, stop


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# -------------------------------------------------------------------------------------- what both draw


def visible(text: str) -> str:
    """Text with a sign for each character that could not be seen; lines break behind theirs."""
    return "".join(
        _SIGNS.get(char, char if char.isprintable() or char in _JOINERS else f"⟨U+{ord(char):04X}⟩")
        for char in text
    )


def _drawn(segment: Segment) -> Iterator[tuple[Token, str]]:
    """The tokens of a segment as drawn: blanks next to its edges and to special tokens have a sign."""
    tokens = segment.tokens
    for index, token in enumerate(tokens):
        text = token.text
        if index == 0 or tokens[index - 1].is_special:
            text = _BLANK * (len(text) - len(text.lstrip(" "))) + text.lstrip(" ")
        last = index == len(tokens) - 1
        if last or tokens[index + 1].is_special:
            text = text.rstrip(" ") + _BLANK * (len(text) - len(text.rstrip(" ")))
        drawn = visible(text)
        yield token, drawn.removesuffix("\n") if last else drawn


def _facts(row: OneRow) -> list[tuple[str, str]]:
    """How the row was read, and what became of it; a label and a text each."""
    facts = [("row", row.source)]
    facts += [("format", row.format)] if row.format else []
    facts += [("not used", f"columns {', '.join(row.unused_columns)}")] if row.unused_columns else []
    if row.pairs or row.template:
        facts.append(("template", row.template or "none: plain text"))
    facts += [("note", notice) for notice in row.notices]
    for verb, reason in row.outcomes:
        stops = "; a run stops here, unless on_bad_row: skip" if verb == "malformed" else ""
        facts.append((verb, reason + stops))
    return facts


def _titled(layouts: Sequence[Layout]) -> Iterator[tuple[str, Part | None]]:
    """Titles, and the part below each; those of several pairs are told apart."""
    for number, layout in enumerate(layouts, start=1):
        which = f"pair {number} of {len(layouts)}, " if len(layouts) > 1 else ""
        for part in layout.parts:
            yield which + part.title, part
        if layout.rejected is None:
            yield f"{which}rejected: none; the NLL alone is trained", None


def _legend(layouts: Sequence[Layout]) -> list[tuple[Role, str]]:
    """The roles that occur, and their meanings."""
    roles = {segment.role for layout in layouts for part in layout.parts for segment in part.segments}
    return [(role, words) for role, words in _MEANINGS.items() if role in roles]


# -------------------------------------------------------------------------------------- terminal


def draw_text(row: OneRow, layouts: Sequence[Layout], console: Console) -> Text:
    """A row for a terminal, or as plain text, with « » around special tokens.

    Args:
        row: How it was read.
        layouts: Of its pairs.
        console: Where it is printed.
    """
    from rich.text import Text

    marks = console.color_system is None  # nothing is printed bold either
    lines = [_labelled(label, Text(visible(text)), console) for label, text in _facts(row)]
    for title, part in _titled(layouts):
        lines += [Text(), *_wrapped(Text(title, style="bold"), console, console.width)]
        lines += [
            _labelled(segment.role, draw_segment(segment, marks=marks), console, _STYLES[segment.role])
            for segment in (part.segments if part else ())
        ]
    if layouts:
        lines.append(Text())
        lines += [_labelled(role, Text(words), console, _STYLES[role]) for role, words in _legend(layouts)]
        special = "« » special token" if marks else "inverse: special token"
        lines.append(_labelled("signs", Text(f"{special}, {_OTHER_SIGNS}"), console))
    return Text("\n").join(lines)


def draw_segment(segment: Segment, *, marks: bool = False) -> Text:
    """A segment in the colour of its role, special tokens inverse; `marks` puts « » around these."""
    from rich.text import Text

    style = _STYLES[segment.role]
    text = Text()
    for token, drawn in _drawn(segment):
        if token.is_special:
            text.append(f"«{drawn}»" if marks else drawn, f"{style} bold reverse")
        else:
            text.append(drawn, style)
    return text


def _labelled(label: str, text: Text, console: Console, style: str = "") -> Text:
    """A text to the right of its label, wrapped to the width of the console."""
    from rich.text import Text

    first = Text(f"{label:<{_INDENT}}", style)
    lines = _wrapped(text, console, max(console.width - _INDENT, 20))
    return Text("\n" + " " * _INDENT).join([first + lines[0], *lines[1:]])


def _wrapped(text: Text, console: Console, width: int) -> Sequence[Text]:
    """The lines of a text, at least one, without blanks at their ends."""
    lines = list(text.wrap(console, width, overflow="fold"))
    for line in lines:
        line.rstrip()
    return lines


def first_pair_lines(pair: TokenizedPair, tokenizer: Any, width: int) -> list[str]:
    """A pair in short, for the first lines of a run: a line for each part, shortened in its middle.

    Args:
        pair: As it trains.
        tokenizer: Its ids are of.
        width: Of a line, in cells of a terminal.
    """
    layout = lay_out(pair, tokenizer, [])
    texts = {part.name: visible(part.text).replace("\n", "") for part in layout.parts}
    texts.setdefault("rejected", "(none)")
    return [f"{name:<11}{_shortened(text, width - 11)}" for name, text in texts.items()]


def _shortened(text: str, width: int) -> str:
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    half = (width - 3) // 2
    return f"{_beginning(text, width - 3 - half)} … {_beginning(text[::-1], half)[::-1]}"


def _beginning(text: str, width: int) -> str:
    from rich.cells import cell_len

    stop = next((stop for stop in range(len(text) + 1) if cell_len(text[: stop + 1]) > width), len(text))
    return text[:stop]


# -------------------------------------------------------------------------------------- page


def draw_page(row: OneRow, layouts: Sequence[Layout]) -> str:
    """A row as one HTML page that loads nothing."""
    css = files("orpo.data").joinpath("show.css").read_text(encoding="utf-8")
    facts = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(visible(text))}</dd>" for label, text in _facts(row)[1:]
    )
    parts = "".join(
        f"<section><h2>{escape(title)}</h2>{_segments_html(part.segments if part else ())}</section>"
        for title, part in _titled(layouts)
    )
    body = f"""<h1>{escape(row.source)}</h1>
<dl>{facts}</dl>
{parts}{_legend_html(layouts) if layouts else ""}{_template_html(row)}"""
    return html_page(f"{row.source} · what trains", css, body)


def _segments_html(segments: Sequence[Segment]) -> str:
    rows = "".join(
        f'<div class="{one.role.name.lower()}"><b>{one.role}</b><p>'
        f"{''.join(_token_html(token, drawn) for token, drawn in _drawn(one))}</p></div>"
        for one in segments
    )
    return f'<div class="segments">{rows}</div>' if rows else ""


def _token_html(token: Token, drawn: str) -> str:
    kind = ' class="special"' if token.is_special else ""
    ids = " ".join(str(one) for one in token.ids)
    return f'<span{kind} title="{ids}">{escape(drawn)}</span>'


def _legend_html(layouts: Sequence[Layout]) -> str:
    rows = "".join(
        f'<div class="{role.name.lower()}"><b>{role}</b><p>{escape(words)}</p></div>'
        for role, words in _legend(layouts)
    )
    signs = (
        f'<span class="special">inverse</span>: special token, {_OTHER_SIGNS}; point at a token for its id'
    )
    return f'<section class="legend"><div class="segments">{rows}</div><p>{signs}</p></section>'


def _template_html(row: OneRow) -> str:
    if not row.template_text:
        return ""
    named = row.template_text if isinstance(row.template_text, dict) else {"": row.template_text}
    return "".join(
        f"<details><summary>chat template {escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for name, text in named.items()
    )
