"""From preference pairs to token ids. (Interface first; the data engineer fills this in.)"""

from collections.abc import Sequence
from dataclasses import dataclass


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
