"""The 72 templates that `trl` ships, against transformers' own rendering of what inference shows."""

from pathlib import Path

import pytest
from real_templates import CASES, TEMPLATES, outcome, table
from transformers.utils import chat_template_utils

DOCS = Path(__file__).parent.parent / "docs" / "templates.md"
PROMISED = {"held", "elsewhere", "not written", "incomplete", "refused"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_trains_as_promised_or_is_counted_with_a_reason(name):
    for case in CASES:
        what, sentences = outcome(name, case)
        assert what in PROMISED, f"{case}: {what}"
        assert what == "held" or sentences, case


def test_conversations_hold_with_every_template_but_those_that_open_a_block_and_drop_it():
    for case in ("single", "multi-turn", "system"):
        others = {name for name in TEMPLATES if outcome(name, case)[0] != "held"}
        assert all(name.startswith("deepseek") for name in others), others


@pytest.mark.skipif(
    not hasattr(chat_template_utils, "_alias_reasoning_fields"),
    reason="an older transformers passes reasoning under one name, where three templates read another",
)
def test_the_table_in_the_documentation_is_the_one_printed():
    assert "\n".join(table()) in DOCS.read_text(encoding="utf-8")
