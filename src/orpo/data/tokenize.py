"""Preference pairs -> token ids: chat template, prompt boundary, end of turn, length policy.

Everything is settled in text the template wrote and then checked in tokens: the prompt ends where the
template has written the header of the answer, its tokens must be a true prefix of the whole conversation's,
and a response ends with the end-of-turn token, once. Masks come from these positions, never from token ids,
so that padding may equal EOS.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from orpo.data.chat_template import ChatTemplate
from orpo.data.counts import RowCounts
from orpo.data.rendering import Dropped, Rendered, RenderedSide, Renderer
from orpo.data.templates import adds_bos
from orpo.data.text_encoder import Ids, TextEncoder
from orpo.pairs import Message, PreferencePair, TokenizedPair

BATCH = 512
_APART = "a token crossed the boundary: the answer is tokenized apart from its prompt"
_NO_IDS: Ids = np.zeros(0, dtype=np.int32)


class PairArrays(NamedTuple):
    """A `TokenizedPair` whose parts are arrays."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    chosen_context: int
    rejected_context: int
    assistant_spans: tuple[tuple[int, int], ...]
    source: str

    def listed(self) -> TokenizedPair:
        """The pair with lists."""
        prompt, chosen, rejected = self.prompt.tolist(), self.chosen.tolist(), self.rejected.tolist()
        return TokenizedPair(prompt, chosen, rejected, *self[3:])

    @property
    def longest(self) -> int:
        """Tokens of the longer side, with its prompt."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class _Outcome(NamedTuple):
    """What one pair became: its tokens, or why it is dropped."""

    tokens: PairArrays | None
    reason: str | None
    notes: list[str]
    lost: list[str]


class _Tokens(NamedTuple):
    """One side: prompt tokens, those without a BOS of ours, answer tokens, whether these were apart."""

    head: Ids
    prompt: Ids
    answer: Ids
    apart: bool = False


class PairTokenizer:
    """Turns pairs into `TokenizedPair`s with one tokenizer, one template and one length limit.

    Attributes:
        counts: Reasons of dropped and changed pairs, filled by `encode`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stop_tokens: Collection[int] | None = None,
        date: datetime | None = None,
    ):
        """Keep the settings; the template is settled when the first conversation needs it.

        Args:
            tokenizer: Of the model to train (any object with the interface of a transformers tokenizer).
            max_length: Longest prompt + response, in tokens; None: no limit.
            chat_template: As for `prepare_template`, like the rest.
            chat_template_kwargs: Variables for the template; those of a pair win over them.
            stop_tokens: Ids that generation stops at, besides EOS.
            date: What the template writes as today's date.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.renderer = Renderer(
            tokenizer,
            chat_template,
            chat_template_kwargs=chat_template_kwargs,
            stop_tokens=stop_tokens,
            date=date,
        )
        self.counts = RowCounts()
        self._texts = TextEncoder(tokenizer)
        self._shows: dict[int, bool] = {}
        self._bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None

    def encode(self, pairs: Sequence[PreferencePair]) -> list[TokenizedPair | None]:
        """Tokenize pairs; None where a pair was dropped.

        A pair longer than `max_length` loses the oldest turns of its prompt, the same on both sides, and no
        more of them than it must.
        """
        return [None if one is None else one.listed() for one in self.encode_arrays(pairs)]

    def encode_arrays(self, pairs: Sequence[PreferencePair]) -> list[PairArrays | None]:
        """As `encode`, with arrays for lists."""
        outcomes = self._encode(pairs)
        if self.max_length is not None:
            self._shorten(pairs, outcomes, self.max_length)
        for pair, outcome in zip(pairs, outcomes, strict=True):
            if outcome.reason is not None:
                self.counts.drop(outcome.reason, pair.source)
            else:
                for note in dict.fromkeys(outcome.notes):
                    self.counts.change(note, pair.source)
                for part in outcome.lost[:1]:  # a row counts once, however much of it is lost
                    self.counts.lose(part, pair.source)
        return [outcome.tokens for outcome in outcomes]

    def _encode(self, pairs: Sequence[PreferencePair]) -> list[_Outcome]:
        """Tokenize pairs in one call of the tokenizer, whatever their length."""
        rendered: list[Rendered | str] = []
        for pair in pairs:
            try:
                rendered.append(self.renderer.render(pair))
            except Dropped as dropped:
                rendered.append(str(dropped))
        sides = [side for one in rendered if not isinstance(one, str) for side in one.sides]
        tokens = iter(self._tokenize(sides))
        outcomes = []
        for pair, one in zip(pairs, rendered, strict=True):
            if isinstance(one, str):
                outcomes.append(_Outcome(None, one, [], []))
                continue
            parts = [next(tokens) for _ in one.sides]
            try:
                apart = [_APART] if any(part is not None and part.apart for part in parts) else []
                outcomes.append(_Outcome(self._assemble(pair, one, parts), None, one.notes + apart, one.lost))
            except Dropped as dropped:
                outcomes.append(_Outcome(None, str(dropped), [], []))
        return outcomes

    # --------------------------------------------------------------------------------------- text to tokens

    def _tokenize(self, sides: list[RenderedSide]) -> list[_Tokens | None]:
        """Prompt and answer of every side; None where the prompt's tokens do not begin the conversation's.

        Tokenizers split text at added tokens first, so an answer reads the same from its anchor on as from
        the start of its conversation; a prompt that both sides share is tokenized once.
        """
        prompts = [side.text[: side.boundary] for side in sides]
        tails = [side.text[side.anchor :] for side in sides]
        texts = list(dict.fromkeys([*prompts, *tails]))
        known = dict(zip(texts, self._texts.encode(texts), strict=True))
        result: list[_Tokens | None] = []
        crossed: list[tuple[int, Ids, Ids]] = []
        for index, (side, prompt, text) in enumerate(zip(sides, prompts, tails, strict=True)):
            head, tail = known[prompt], known[text]
            header = head if side.anchor == 0 else _last_header(head, tail)
            result.append(_Tokens(self._with_bos(head), head, tail[len(header) :]))
            if len(tail) <= len(header) or not _begins(tail, header):
                crossed.append((index, header, tail))
        # A token lies across these boundaries. At inference the prompt is tokenized without its answer.
        apart = self._encode_apart([sides[index].text[sides[index].boundary :] for index, _, _ in crossed])
        for (index, header, tail), answers in zip(crossed, apart, strict=True):
            part, whole = result[index], self._decode(tail)
            fitting = (ids for ids in answers if self._decode(np.concatenate([header, ids])) == whole)
            same = next(fitting, _NO_IDS)
            result[index] = part._replace(answer=same, apart=True) if part is not None and len(same) else None
        return result

    def _encode_apart(self, answers: list[str]) -> list[list[Ids]]:
        """Each answer by itself: as the tokenizer reads a text, and as it reads one inside a text.

        SentencePiece vocabularies put a blank in front of a text, which the prompt may end with already.
        """
        (front,) = self._texts.encode(["\n"]) if answers else [_NO_IDS]
        plain = self._texts.encode(answers)
        inside = self._texts.encode(["\n" + answer for answer in answers])
        return [
            [one, two[len(front) :] if _begins(two, front) else one]
            for one, two in zip(plain, inside, strict=True)
        ]

    def _decode(self, ids: Ids) -> str:
        decoded = self.tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def _with_bos(self, ids: Ids) -> Ids:
        """BOS exactly once: not doubled where both the template and the text write it, never missing."""
        bos = self.tokenizer.bos_token_id
        while len(ids) > 1 and ids[0] == ids[1] == bos:
            ids = ids[1:]
        if self._bos is None or (len(ids) and ids[0] == self._bos):
            return ids
        return np.concatenate([np.array([self._bos], dtype=np.int32), ids])

    # --------------------------------------------------------------------------------------- one pair

    def _assemble(self, pair: PreferencePair, rendered: Rendered, parts: list[_Tokens | None]) -> PairArrays:
        whole = [part for part in parts if part is not None and len(part.head)]
        if len(whole) < len(parts):
            raise Dropped(
                "no boundary: the prompt's tokens are not a prefix of the conversation's; "
                "give a chat_template whose header of an answer ends in no blank"
            )
        for part in whole:
            self._check(part.answer, rendered.template)
        if len(whole) == 2 and _same(whole):
            raise Dropped("chosen and rejected are identical once rendered")
        shared = self._shared(rendered, whole)
        contexts = [len(part.head) - shared for part in whole]
        sides = [
            np.concatenate([part.head[shared:], part.answer]) if context else part.answer
            for part, context in zip(whole, contexts, strict=True)
        ]
        return PairArrays(
            prompt=whole[0].head[:shared],
            chosen=sides[0],
            rejected=sides[1] if len(sides) == 2 else _NO_IDS,
            chosen_context=contexts[0],
            rejected_context=contexts[1] if len(sides) == 2 else 0,
            assistant_spans=self._spans(rendered, whole[0]),
            source=pair.source,
        )

    def _check(self, answer: Ids, template: ChatTemplate | None) -> None:
        last = int(answer[-1]) if len(answer) else None
        if last is None or last not in self.renderer.added:
            raise Dropped("an answer does not end with an end-of-turn token")
        if not self._says_something(answer):
            raise Dropped("an answer is empty once rendered")
        ends = {last} if template is None else {last, *self.renderer.end_ids(template)}
        stops = np.flatnonzero(np.logical_or.reduce([answer[:-1] == token for token in ends]))
        if len(stops):
            raise Dropped(
                f"the end-of-turn token {self._decode(answer[stops[:1]])} occurs inside an answer; "
                "take it out of the data, or give a chat_template that writes it at the end only"
            )

    def _says_something(self, answer: Ids) -> bool:
        """Whether there is more than added tokens and blanks in an answer."""
        if any(self._shows_itself(token) for token in answer.tolist()):
            return True
        # The bytes of one letter show nothing by themselves.
        own = [token not in self.renderer.added for token in answer.tolist()]
        return self._decode(answer[own]).strip() != ""

    def _shows_itself(self, token: int) -> bool:
        """Whether a token is no added one, and more than blanks."""
        if token not in self._shows:
            own = token not in self.renderer.added
            self._shows[token] = own and self._decode(np.array([token])).strip() != ""
        return self._shows[token]

    def _shared(self, rendered: Rendered, parts: list[_Tokens]) -> int:
        """How many tokens both sides start with, cut back to a message boundary."""
        if all(side.boundary == rendered.shared[0] for side in rendered.sides):
            return len(parts[0].head)
        for end in rendered.shared:
            ids = self._with_bos(self._texts.encode([rendered.sides[0].text[:end]])[0])
            if len(ids) and all(_begins(part.head, ids) for part in parts):
                return len(ids)
        raise Dropped("no boundary: the sides share no whole message in tokens")

    def _spans(self, rendered: Rendered, part: _Tokens) -> tuple[tuple[int, int], ...]:
        shift = len(part.head) - len(part.prompt)  # BOS put in front, or a doubled one taken away
        text = rendered.sides[0].text[: rendered.sides[0].boundary]

        def at(position: int) -> int:
            return self._texts.token_at(text, part.prompt, position) + shift

        return tuple((at(start), at(stop)) for start, stop in rendered.spans)

    # --------------------------------------------------------------------------------------- length

    def _shorten(self, pairs: Sequence[PreferencePair], outcomes: list[_Outcome], limit: int) -> None:
        """Replace the outcomes that are too long, by bisection over the places where a prompt may be cut."""
        searches = {
            index: _Search(pairs[index], outcome)
            for index, outcome in enumerate(outcomes)
            if outcome.tokens is not None and outcome.tokens.longest > limit
        }
        while active := [search for search in searches.values() if search.low < search.high]:
            tried = self._encode([search.next_pair() for search in active])
            for search, outcome in zip(active, tried, strict=True):
                search.take(outcome, limit)
        for index, search in searches.items():
            outcomes[index] = search.result(limit)


class _Search:
    """The fewest turns to leave out of one pair: a later cut gives a shorter prompt."""

    def __init__(self, pair: PreferencePair, outcome: _Outcome):
        self.pair = pair
        self.cuts = shorter_prompts(pair.prompt)
        self.low, self.high = 0, len(self.cuts)
        self.best: _Outcome | None = None
        self.shortest = outcome

    def next_pair(self) -> PreferencePair:
        return replace(self.pair, prompt=self.cuts[(self.low + self.high) // 2])

    def take(self, outcome: _Outcome, limit: int) -> None:
        middle = (self.low + self.high) // 2
        if outcome.tokens is not None and outcome.tokens.longest <= limit:
            self.high, self.best = middle, outcome
        else:
            self.low = middle + 1
            self.shortest = outcome if outcome.tokens is not None else self.shortest

    def result(self, limit: int) -> _Outcome:
        if self.best is not None:
            return self.best._replace(notes=[*self.best.notes, "oldest turns left out to fit max_length"])
        tokens = self.shortest.tokens
        assert tokens is not None
        answer = max(
            len(tokens.chosen) - tokens.chosen_context, len(tokens.rejected) - tokens.rejected_context
        )
        what = "an answer alone" if answer >= limit else "the last question with its answer"
        return _Outcome(None, f"too long: {what} exceeds max_length {limit}", [], [])


def _last_header(head: Ids, tail: Ids) -> Ids:
    """The prompt's tokens from the anchor on, with which `tail` begins."""
    starts = np.flatnonzero(head == tail[0]) if len(tail) else _NO_IDS
    return head[starts[-1] if len(starts) else 0 :]


def _begins(ids: Ids, beginning: Ids) -> bool:
    return ids[: len(beginning)].tobytes() == beginning.tobytes()


def _same(parts: list[_Tokens]) -> bool:
    """Whether two sides are the same tokens."""
    one, other = parts
    if len(one.head) + len(one.answer) != len(other.head) + len(other.answer):
        return False
    return bool((np.concatenate([one.head, one.answer]) == np.concatenate([other.head, other.answer])).all())


def shorter_prompts(prompt: list[Message] | str) -> list[list[Message]]:
    """The prompts a long one may be cut to: the system turn kept, then from a later user turn on."""
    if isinstance(prompt, str):
        return []
    start = 1 if prompt[:1] and prompt[0]["role"] == "system" else 0
    users = [index for index in range(start + 1, len(prompt)) if prompt[index]["role"] == "user"]
    return [prompt[:start] + prompt[index:] for index in users]


def stream_tokenized(
    pairs: Iterable[PreferencePair],
    tokenizer: Any,
    *,
    max_length: int | None,
    chat_template: str | None = None,
    counts: RowCounts | None = None,
    drop_rejected: bool = False,
    **options: Any,
) -> Iterator[TokenizedPair]:
    """Tokenize pairs as they come, 512 at a time.

    Args:
        pairs: For instance of `stream_preferences`.
        tokenizer: Of the model to train.
        max_length: Longest prompt + response, in tokens; None: no limit.
        chat_template: As for `prepare_template`.
        counts: Gets the reasons as rows are dropped or changed; their total is the reader's to count.
        drop_rejected: Leave the rejected sides out, once they have had their say about the length.
        options: Further settings of `PairTokenizer`.
    """
    encoder = PairTokenizer(tokenizer, max_length=max_length, chat_template=chat_template, **options)
    if counts is not None:
        encoder.counts = counts
    remaining = iter(pairs)
    while batch := list(islice(remaining, BATCH)):
        for tokens in encoder.encode(batch):
            if tokens is not None:
                yield replace(tokens, rejected=[], rejected_context=0) if drop_rejected else tokens
