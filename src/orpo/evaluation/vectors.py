"""Texts as vectors of length 1, near each other where they speak of the same things.

TF-IDF of words, reduced by a truncated SVD, needs no model. A folder in the layout of sentence-transformers
(a transformer, pooling, normalisation) is read with transformers alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo.data.stages import report
from orpo.errors import ModelError, first_line

Float32 = npt.NDArray[np.float32]
_DIMENSIONS = 128
_WORDS = 2**16
"""Most words, the commonest, that TF-IDF looks at."""
_BATCH = 64
_POOLING = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
}  # fmt: skip


def tfidf(texts: Iterable[str], total: int, *, seed: int) -> Float32:
    """Vectors of the words of texts, reduced to few dimensions, [n, d].

    Args:
        texts: One after the other.
        total: How many there are.
        seed: Of the reduction.
    """
    from sklearn.decomposition import TruncatedSVD

    words = word_weights(texts, total)
    if words is None:
        return np.ones((total, 1), dtype=np.float32)
    report("reducing", 0, None)
    dimensions = min(_DIMENSIONS, min(words.shape) - 1)
    if dimensions < 2:
        return _normalised(words.toarray())
    reduced = TruncatedSVD(dimensions, random_state=seed, n_iter=3).fit_transform(words)
    return _normalised(reduced.astype(np.float32))


def word_weights(texts: Iterable[str], total: int) -> Any:
    """TF-IDF of the words of texts: a sparse matrix with rows of length 1; None where no text has a word."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    def counted() -> Iterable[str]:
        for number, text in enumerate(texts):
            if number % 1000 == 0:
                report("counting words", number, total)
            yield text

    least = 2 if total > 1000 else 1
    vectorizer = TfidfVectorizer(
        max_features=_WORDS, min_df=least, sublinear_tf=True, dtype=np.float32, token_pattern=r"\w+"
    )
    try:
        return vectorizer.fit_transform(counted())
    except ValueError:
        return None


def _normalised(vectors: Any) -> Float32:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Float32 = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return result


class SentenceEncoder:
    """A sentence-embedding model: transformer, pooling, and normalisation where its modules say so.

    Args:
        folder: With modules.json and the folders it names, as sentence-transformers saves them.

    Raises:
        ModelError: The folder is no such model, or has a module that is not known.
    """

    def __init__(self, folder: str | Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._folder = Path(folder).expanduser()
        transformer, self._pooling = self._modules()
        settings = self._read(transformer / "sentence_bert_config.json", optional=True)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(transformer)
            self._model = AutoModel.from_pretrained(transformer).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"embeddings {folder}: cannot be loaded ({first_line(error)})") from error
        if torch.cuda.is_available():
            self._model.to("cuda")
        longest = settings.get("max_seq_length") or getattr(
            self._model.config, "max_position_embeddings", 512
        )
        self._max_length = min(int(longest), 512)

    def encode(self, texts: Sequence[str]) -> Float32:
        """Vectors of texts, [n, d], of length 1."""
        import torch

        found: list[Float32] = [np.zeros(0, dtype=np.float32)] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding
        for start in range(0, len(order), _BATCH):
            report("embedding", start, len(texts))
            batch = order[start : start + _BATCH]
            tokens = self._tokenizer(
                [texts[index] for index in batch],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                hidden = self._model(**tokens).last_hidden_state.float()
            vectors = self._pooled(hidden, tokens["attention_mask"].unsqueeze(-1).float())
            for index, vector in zip(batch, vectors.cpu().numpy(), strict=True):
                found[index] = vector
        return _normalised(np.stack(found))

    def _pooled(self, hidden: Any, mask: Any) -> Any:
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "max":
            return hidden.masked_fill(mask == 0, -1e9).amax(1)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _modules(self) -> tuple[Path, str]:
        """The folder of the transformer, and how its hidden states are pooled."""
        modules = self._read(self._folder / "modules.json")
        transformer, pooling = self._folder, None
        for module in modules:
            kind = str(module["type"]).rpartition(".")[2]
            place = self._folder / module["path"]
            if kind == "Transformer":
                transformer = place
            elif kind == "Pooling":
                config = self._read(place / "config.json")
                named = [name for key, name in _POOLING.items() if config.get(key)]
                pooling = config.get("pooling_mode") or (named[0] if len(named) == 1 else None)
            elif kind != "Normalize":  # vectors are of length 1 in any case
                raise ModelError(
                    f"embeddings {self._folder}: its module {kind} is not known; use another model"
                )
        if pooling not in _POOLING.values():
            raise ModelError(
                f"embeddings {self._folder}: its pooling is not one of {', '.join(_POOLING.values())}"
            )
        return transformer, str(pooling)

    def _read(self, file: Path, *, optional: bool = False) -> Any:
        if optional and not file.is_file():
            return {}
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"embeddings {self._folder}: {file.name} cannot be read ({first_line(error)}); give a "
                "folder that sentence-transformers has saved"
            ) from error
