"""What a number is called, and which way it goes: whether more of it is better, or less.

`reward_model_score`, `helpfulness.Rating`, `chosenScore`: the last word says what it is, those before it by
whom or of what. One word that is not known (`refusal_score`, `edit_score`) may turn it round, so a name that
has one says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAST_WORDS = {"score": 1, "rating": 1, "reward": 1, "vote": 1, "upvote": 1, "rank": -1}
_ASPECTS = frozenset({
    "helpfulness", "helpful", "honesty", "truthfulness", "harmlessness", "safety", "instruction", "following",
    "correctness", "accuracy", "coherence", "relevance", "usefulness", "faithfulness", "completeness",
    "clarity", "factuality", "fluency",
})  # fmt: skip
_OVERALL = frozenset({
    "quality", "preference", "model", "reward", "rm", "pm", "human", "user", "annotator", "rater", "expert",
    "judge", "critic", "evaluator", "llm", "gpt", "claude", "llama", "gemini", "qwen", "mistral", "deepseek",
    "prometheus", "armo", "armorm", "ultra", "ultrarm", "pair", "pairrm", "skywork", "starling", "nemotron",
    "internlm", "deberta", "annotation", "feedback", "evaluation", "overall", "fine", "grained", "final",
    "mean", "avg", "average", "total", "weighted", "raw", "normalized", "score", "vote", "num", "number",
    "my", "turbo", "mini", "instruct", "v", "up", "positive", "pro", "community",
})  # fmt: skip
"""Who says it, how it is computed, and words that say nothing."""


def words_of(name: str) -> list[str]:
    """The words of a name in lower case, without numbers (`gpt4_RMScores`: gpt, rm, scores)."""
    parted = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
    return [word for word in re.findall(r"\d+[a-z]*|[a-z]+", parted) if not word[0].isdigit()]


def is_measure(words: Sequence[str]) -> bool:
    """Whether the last word is one of a number that says how good something is."""
    return bool(words) and _bare(words[-1]) in _LAST_WORDS


def direction(words: Sequence[str], *, overall: bool = False) -> int | None:
    """1 where more is better, -1 where less is; None where the words do not say.

    Args:
        words: Of the name.
        overall: Of one aspect among several (honesty) say nothing, as the better answer may have less of it.
    """
    known = _OVERALL if overall else _OVERALL | _ASPECTS
    if not is_measure(words) or not all(word in known or _bare(word) in known for word in words[:-1]):
        return None
    return _LAST_WORDS[_bare(words[-1])]


def _bare(word: str) -> str:
    return word.removesuffix("s")
