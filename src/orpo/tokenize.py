"""Preference pairs -> token ids: chat template, prompt boundary, end of turn, length policy.

Everything is settled in text the template wrote and then checked in tokens: the prompt ends where the template has
written the header of the answer, its tokens must be a true prefix of the whole conversation's, and a response ends
with the end-of-turn token, once. Masks come from these positions, never from token ids, so that padding may equal
EOS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from orpo.counts import RowCounts
from orpo.errors import ModelError
from orpo.formats import Message
from orpo.preferences import PreferencePair
from orpo.templates import ChatTemplate, adds_bos, first_line, prepare_template

Tokens = list[int]
_MARKER = "ORPO turn marker"
BATCH = 512


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One preference pair as token ids.

    Both sides are `prompt ++ side`. Usually a side is the response alone; where the two conversations part before
    the last turn, a side starts with turns of its own, counted by `chosen_context` and `rejected_context`.

    Attributes:
        prompt: Tokens both sides start with, cut at a message boundary; at least one.
        chosen: The rest of the chosen side; its response is `chosen[chosen_context:]`, at least one token, the
            end-of-turn token last.
        rejected: The same for the rejected side; empty for a row that trains the NLL alone.
        chosen_context: Leading tokens of `chosen` that belong to earlier turns.
        rejected_context: The same for `rejected`.
        assistant_spans: Half-open ranges of the earlier assistant turns in `prompt ++ chosen`.
        source: Where the pair came from, for messages: `pairs.jsonl:118`.
    """

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    chosen_context: int = 0
    rejected_context: int = 0
    assistant_spans: tuple[tuple[int, int], ...] = ()
    source: str = ""

    def __len__(self) -> int:
        """Tokens the pair occupies in a packed row, its prompt counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


class Dropped(Exception):
    """A well-formed pair that cannot train; the message is the reason."""


class _Encoded(NamedTuple):
    """A text's tokens, and the tokenizer's record of where in the text each came from (fast tokenizers only)."""

    ids: Tokens
    record: Any


class _Side(NamedTuple):
    """One conversation as text: its first `boundary` characters are the prompt, the rest is the answer."""

    text: str
    boundary: int


class PairTokenizer:
    """Turns pairs into `TokenizedPair`s with one tokenizer, one template and one length limit."""

    def __init__(self, tokenizer: Any, *, max_length: int | None, chat_template: str | None = None):
        """Keep the settings; the template is settled when the first conversation needs it.

        Args:
            tokenizer: Of the model to train (any object with the interface of a transformers tokenizer).
            max_length: Longest prompt + response, in tokens; None: no limit.
            chat_template: As for `prepare_template`.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.counts = RowCounts()
        self._chat_template = chat_template
        self._bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        self._added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template in use."""
        return prepare_template(self.tokenizer, self._chat_template)

    def encode(self, pairs: Sequence[PreferencePair]) -> list[TokenizedPair | None]:
        """Tokenize pairs in one call of the tokenizer; None where a pair was dropped, its reason counted."""
        sides = [self._attempt(pair, self._render) for pair in pairs]
        texts = [text for one in sides if one is not None for text in _texts(one)]
        encoded = iter(self._encode_texts(texts))
        taken = [None if one is None else [next(encoded) for _ in _texts(one)] for one in sides]
        return [
            None if one is None else self._attempt(pair, self._fit, one, tokens)
            for pair, one, tokens in zip(pairs, sides, taken, strict=True)
        ]

    def _attempt(self, pair: PreferencePair, step: Any, *arguments: Any) -> Any:
        try:
            return step(pair, *arguments)
        except Dropped as dropped:
            self.counts.drop(str(dropped), pair.source)
            return None

    # --------------------------------------------------------------------------------------- text

    def _render(self, pair: PreferencePair) -> list[_Side]:
        """The chosen and, if there is one, the rejected side as text."""
        answers = [answer for answer in (pair.chosen, pair.rejected) if answer is not None]
        if isinstance(pair.prompt, str):
            return [_Side(pair.prompt + self._plain_end(str(answer)), len(pair.prompt)) for answer in answers]
        try:
            sides = [self._render_side(pair.prompt, list(answer), pair) for answer in answers]
        except Dropped:
            raise
        except Exception as error:
            raise Dropped(f"the chat template refuses the row: {first_line(error)}") from error
        if pair.tools and self.template.ignores_tools:
            self.counts.change("the chat template does not write the tools", pair.source)
        if self.template.folds_system and pair.prompt and pair.prompt[0]["role"] == "system":
            self.counts.change("system text put into the first user turn (template has none)", pair.source)
        if parts_early(pair):
            return sides
        # A shared prompt is the same text on both sides, so its boundary must be too.
        boundary = min(side.boundary for side in sides)
        return [side._replace(boundary=boundary) for side in sides]

    def _plain_end(self, answer: str) -> str:
        """A plain-text answer with its end token: the one it was written with, else EOS."""
        bare = answer.rstrip()
        if any(bare.endswith(token) for token in self._added_texts):
            return bare
        if self.tokenizer.eos_token is None:
            raise ModelError("the tokenizer has no EOS token, so no answer could end; set tokenizer.eos_token")
        return answer + str(self.tokenizer.eos_token)

    @cached_property
    def _added_texts(self) -> tuple[str, ...]:
        return tuple(str(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(self._added)))

    def _render_side(self, context: list[Message], answer: list[Message], pair: PreferencePair) -> _Side:
        before, last = [*context, *answer[:-1]], answer[-1]
        end = self.template.end_token
        while last["content"].rstrip().endswith(end):
            last = {**last, "content": last["content"].rstrip().removesuffix(end)}
            self.counts.change(f"{end} written in the answer itself: not repeated", pair.source)
        asked = self._turns(before, pair, ask=True)
        text = self.template.finish(self._turns([*before, last], pair, ask=False))
        if text.startswith(asked):
            return _Side(text, len(asked))
        return _Side(text, self._boundary(before, asked, text, pair))

    def _boundary(self, before: list[Message], asked: str, text: str, pair: PreferencePair) -> int:
        """Where the prompt ends if the template writes another header when asked than before an answer.

        The last place up to which both agree and at which a message begins: the answer's content, or its header.
        """
        agree = _common(asked, text)
        marked = self._turns([*before, {"role": "assistant", "content": _MARKER}], pair, ask=False)
        places = [marked.find(_MARKER), len(self._turns(before, pair, ask=False))]
        fitting = [place for place in places if 0 < place <= agree and text[:place] == marked[:place]]
        if not fitting:
            raise Dropped("no boundary: the chat template renders the prompt differently once it is answered")
        self.counts.change("prompt ends before the header the template writes when asked", pair.source)
        return max(fitting)

    def _turns(self, turns: Sequence[Message], pair: PreferencePair, *, ask: bool) -> str:
        return self.template.render(self.tokenizer, turns, pair.tools, ask=ask)

    # --------------------------------------------------------------------------------------- tokens

    def _encode_texts(self, texts: list[str]) -> list[_Encoded]:
        if not texts:
            return []
        batch = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        records = getattr(batch, "encodings", None) or [None] * len(texts)
        return [_Encoded(ids, record) for ids, record in zip(batch["input_ids"], records, strict=True)]

    def _with_bos(self, ids: Tokens) -> Tokens:
        """BOS exactly once: never doubled where the template and the text both wrote it, never missing."""
        bos = self.tokenizer.bos_token_id
        while len(ids) > 1 and ids[0] == ids[1] == bos:
            ids = ids[1:]
        return [self._bos, *ids] if self._bos is not None and ids[:1] != [self._bos] else ids

    def _tokens(self, pair: PreferencePair, sides: list[_Side], encoded: list[_Encoded]) -> TokenizedPair:
        """Prompt and answers of one pair as tokens; `encoded` belongs to `_texts(sides)`."""
        prompts, texts = encoded[0::2], encoded[1::2]
        heads = [self._with_bos(one.ids) for one in prompts]
        if not all(heads):
            raise Dropped("no boundary: the prompt is empty")
        answers = [
            self._answer(pair, side, head, self._with_bos(one.ids))
            for side, head, one in zip(sides, heads, texts, strict=True)
        ]
        if len(answers) == 2 and heads[0] + answers[0] == heads[1] + answers[1]:
            raise Dropped("chosen and rejected are identical after rendering")
        shared = self._shared(pair, sides, heads)
        spans = () if pair.is_text else self._spans(pair, sides[0], prompts[0], len(heads[0]))
        rests = [head[shared:] + answer for head, answer in zip(heads, answers, strict=True)]
        context = [len(head) - shared for head in heads]
        return TokenizedPair(
            prompt=heads[0][:shared],
            chosen=rests[0],
            rejected=rests[1] if len(rests) == 2 else [],
            chosen_context=context[0],
            rejected_context=context[1] if len(rests) == 2 else 0,
            assistant_spans=spans,
            source=pair.source,
        )

    def _answer(self, pair: PreferencePair, side: _Side, head: Tokens, whole: Tokens) -> Tokens:
        """The tokens behind the prompt, which must be a true prefix of the whole."""
        answer = whole[len(head) :]
        if whole[: len(head)] != head or not answer:
            # A token lies across the boundary. At inference the prompt is tokenized without its answer: do the same.
            (apart,) = self._encode_texts([side.text[side.boundary :]])
            answer = apart.ids
            if self.tokenizer.decode(head + answer) != self.tokenizer.decode(whole):
                raise Dropped("no boundary: the prompt's tokens are not a prefix of the conversation's")
            self.counts.change("a token crossed the boundary: answer tokenized apart from its prompt", pair.source)
        if not answer or answer[-1] not in self._added:
            raise Dropped("the answer does not end with an end-of-turn token")
        if len(answer) == 1:
            raise Dropped("the answer is empty after rendering")
        if answer[-1] in answer[:-1]:
            raise Dropped("the end-of-turn token occurs inside an answer")
        return answer

    def _shared(self, pair: PreferencePair, sides: list[_Side], heads: list[Tokens]) -> int:
        """How many tokens both sides start with, cut back to a message boundary."""
        if not parts_early(pair):
            return len(heads[0])
        assert not isinstance(pair.prompt, str) and pair.rejected is not None
        turns = [[*pair.prompt, *pair.chosen], [*pair.prompt, *pair.rejected]]
        for place in range(len(pair.prompt), 0, -1):
            ask = all(conversation[place]["role"] == "assistant" for conversation in turns)
            try:
                text = self._turns(pair.prompt[:place], pair, ask=ask)
            except Exception:  # a template may refuse a conversation that breaks off here
                continue
            if all(side.text.startswith(text) for side in sides):
                ids = self._with_bos(self._encode_texts([text])[0].ids)
                if ids and all(head[: len(ids)] == ids for head in heads):
                    return len(ids)
        raise Dropped("no boundary: the sides share no whole message")

    # --------------------------------------------------------------------------------------- earlier answers

    def _spans(
        self, pair: PreferencePair, side: _Side, encoded: _Encoded, length: int
    ) -> tuple[tuple[int, int], ...]:
        """Token ranges of the earlier assistant turns, their end-of-turn token included."""
        turns = [*pair.prompt, *pair.chosen[:-1]]
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]  # type: ignore[index]
        if not places:
            return ()
        text = side.text[: side.boundary]
        ranges = self._spans_at_once(turns, places, text, pair)  # type: ignore[arg-type]
        if ranges is None:
            found = [self._span(turns, place, text, pair) for place in places]  # type: ignore[arg-type]
            ranges = [one for one in found if one is not None]
            if len(ranges) < len(places):
                self.counts.change("an earlier answer was not found: left out of nll_on: assistant", pair.source)
        shift = length - len(encoded.ids)  # BOS put in front, or a doubled one taken away
        return tuple((self._token(encoded, text, a) + shift, self._token(encoded, text, b) + shift) for a, b in ranges)

    def _spans_at_once(
        self, turns: list[Message], places: list[int], text: str, pair: PreferencePair
    ) -> list[tuple[int, int]] | None:
        """Character ranges from one rendering with a marker for every answer; None if the text does not match it."""
        if any(set(turns[place]) > {"role", "content"} for place in places):
            return None
        marked = [{**turn, "content": _MARKER} if turn["role"] == "assistant" else turn for turn in turns]
        pieces = self._turns(marked, pair, ask=True).split(_MARKER)
        if len(pieces) != len(places) + 1 or not text.startswith(pieces[0]):
            return None
        ranges, position = [], len(pieces[0])
        for place, piece in zip(places, pieces[1:], strict=True):
            content = turns[place]["content"]
            said = next((c for c in (content, content.strip()) if text.startswith(c + piece, position)), None)
            if said is None:
                return None
            stop = position + len(said)
            ranges.append((position, stop + (len(self.template.end) if piece.startswith(self.template.end) else 0)))
            position = stop + len(piece)
        return ranges

    def _span(self, turns: list[Message], place: int, text: str, pair: PreferencePair) -> tuple[int, int] | None:
        """Character range of one answer: between the conversation up to it, asked, and up to it, answered."""
        try:
            before = self._turns(turns[:place], pair, ask=True)
            after = self.template.finish(self._turns(turns[: place + 1], pair, ask=False))
        except Exception:  # a template may refuse a conversation that breaks off here
            return None
        return (len(before), len(after)) if text.startswith(before) and text.startswith(after) else None

    def _token(self, encoded: _Encoded, text: str, position: int) -> int:
        """Number of tokens before a character."""
        if position >= len(text):
            return len(encoded.ids)
        if encoded.record is None:
            return _common(self._encode_texts([text[:position]])[0].ids, encoded.ids)
        while position < len(text):
            token = encoded.record.char_to_token(position)
            if token is not None:
                return int(token)
            position += 1
        return len(encoded.ids)

    # --------------------------------------------------------------------------------------- length

    def _fit(self, pair: PreferencePair, sides: list[_Side], encoded: list[_Encoded]) -> TokenizedPair:
        """The pair within `max_length`: the oldest turns of its prompt go first, the same on both sides."""
        tokens = self._tokens(pair, sides, encoded)
        if self.max_length is None or _longest(tokens) <= self.max_length:
            return tokens
        cuts = _cuts(pair.prompt)
        low, high, best = 0, len(cuts), None
        while low < high:  # the fewest turns: a later cut is a shorter prompt
            middle = (low + high) // 2
            tried = self._encode_one(replace(pair, prompt=cuts[middle]))
            tokens = tried
            if _longest(tried) <= self.max_length:
                high, best = middle, tried
            else:
                low = middle + 1
        if best is not None:
            self.counts.change("oldest turns left out to fit max_length", pair.source)
            return best
        answer = max(len(tokens.chosen) - tokens.chosen_context, len(tokens.rejected) - tokens.rejected_context)
        what = "the answer alone" if answer >= self.max_length else "the last question with its answer"
        raise Dropped(f"too long: {what} exceeds max_length {self.max_length}")

    def _encode_one(self, pair: PreferencePair) -> TokenizedPair:
        sides = self._render(pair)
        return self._tokens(pair, sides, self._encode_texts(_texts(sides)))


def parts_early(pair: PreferencePair) -> bool:
    """Whether the conversations part before the last turn."""
    if pair.is_text or pair.rejected is None:
        return False
    return len(pair.chosen) > 1 or len(pair.rejected) > 1


def _texts(sides: list[_Side]) -> list[str]:
    return [text for side in sides for text in (side.text[: side.boundary], side.text)]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _longest(tokens: TokenizedPair) -> int:
    return len(tokens.prompt) + max(len(tokens.chosen), len(tokens.rejected))


def _cuts(prompt: list[Message] | str) -> list[list[Message]]:
    """The shorter prompts allowed: the system turn kept, then from a later user turn on."""
    if isinstance(prompt, str):
        return []
    start = 1 if prompt[:1] and prompt[0]["role"] == "system" else 0
    users = [place for place in range(start + 1, len(prompt)) if prompt[place]["role"] == "user"]
    return [prompt[:start] + prompt[place:] for place in users]


def stream_tokenized(
    pairs: Iterable[PreferencePair],
    tokenizer: Any,
    *,
    max_length: int | None,
    chat_template: str | None = None,
    counts: RowCounts | None = None,
    drop_rejected: bool = False,
) -> Iterator[TokenizedPair]:
    """Tokenize pairs as they come, 512 at a time.

    Args:
        pairs: For instance of `stream_preferences`.
        tokenizer: Of the model to train.
        max_length: Longest prompt + response, in tokens; None: no limit.
        chat_template: As for `prepare_template`.
        counts: Gets the reasons as rows are dropped or changed; their total is the reader's to count.
        drop_rejected: Leave the rejected sides out, once they have had their say about the length.
    """
    encoder = PairTokenizer(tokenizer, max_length=max_length, chat_template=chat_template)
    if counts is not None:
        encoder.counts = counts
    remaining = iter(pairs)
    while batch := list(islice(remaining, BATCH)):
        for tokens in encoder.encode(batch):
            if tokens is not None:
                yield replace(tokens, rejected=[], rejected_context=0) if drop_rejected else tokens
