#!/usr/bin/env bash
# tokenizer.json states an id for every added token. The tokenizers library does not use it: a token that the model's
# vocabulary has gets the id it has there, any other one the next free id, and nothing is raised or returned. A file
# in which an end-of-turn token was moved to the id that the model was trained with (or whose vocabulary was cut, so
# that ids beyond it are stated) loads, and every text with that token gets another id than the file says. The model's
# embedding of the stated id is then never used.
# Seen with tokenizers 0.22.2 (and 0.23.3), Python 3.11, 2026-11-27:
#     stated 50, "what" is in the vocabulary: 3
#     stated 50, "<|end|>" is not: 4
#     stated 1, which is taken by "b": 4
# The way out: after loading, compare tokenizer.token_to_id(content) with the id in the file for each added token.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.22.2
"$place/venv/bin/python" - <<'PYTHON'
import json

from tokenizers import Tokenizer, models, pre_tokenizers

plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "what": 3}, unk_token="[UNK]"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
saved = json.loads(plain.to_str())


def loaded(content, number):
    token = {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
    tokenizer = Tokenizer.from_str(json.dumps({**saved, "added_tokens": [token]}))
    assert tokenizer.encode(f"a {content} b").ids == [0, tokenizer.token_to_id(content), 1]
    return tokenizer.token_to_id(content)


found = [loaded("what", 50), loaded("<|end|>", 50), loaded("<|end|>", 1)]
print('stated 50, "what" is in the vocabulary:', found[0])
print('stated 50, "<|end|>" is not:', found[1])
print('stated 1, which is taken by "b":', found[2])
assert found == [3, 4, 4], "the behaviour has changed"
PYTHON
