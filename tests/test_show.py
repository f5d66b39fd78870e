"""A row as it is shown: every token, with what the NLL and the odds are over, and nothing hidden."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tokenizers
import transformers
from rich.cells import cell_len
from rich.console import Console
from tiny_tokenizer import SHAPES, tiny_tokenizer

from orpo import cli
from orpo.data.one_row import OneRow, find_row, read_row
from orpo.data.show import (
    Layout,
    Role,
    Segment,
    Token,
    draw_page,
    draw_segment,
    draw_text,
    first_pair_lines,
    lay_out,
    visible,
)
from orpo.engine.packing import Role as Scored
from orpo.engine.packing import nll_ranges, pack
from orpo.errors import DataError
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective, OrpoSettings

DEMO = Path(cli.__file__).parent / "demo"


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


ROW = {
    "prompt": [
        turn("user", "What is „Möwe“? 🦜"),
        turn("assistant", "A gull."),
        turn("user", "A poem,\nplease.\t日本"),
    ],
    "chosen": [turn("assistant", "The sea is wide.\n\n  Ö 🏽")],
    "rejected": [turn("assistant", "No, I will not.")],
}
PARTING = {
    "chosen": [turn("user", "Hi"), turn("assistant", "Yes."), turn("user", "Why?"), turn("assistant", "So.")],
    "rejected": [
        turn("user", "Hi"),
        turn("assistant", "No."),
        turn("user", "How?"),
        turn("assistant", "Eh."),
    ],
}
TEXTS = {"prompt": "The sea is ", "chosen": " wide. ", "rejected": "blue"}


def shown(data: list, row: str | int = 0, tokenizer=None, **settings) -> OneRow:
    settings = OrpoSettings(**settings)
    return read_row(find_row(data, row, settings), settings, tokenizer or tiny_tokenizer())


def laid_out(row: dict, tokenizer, objective: Objective | None = None) -> tuple[TokenizedPair, Layout]:
    (pair,) = shown([row], tokenizer=tokenizer, sft_rows="use").pairs
    objective = objective or Objective()
    return pair, lay_out(pair, tokenizer, nll_ranges(pair, objective), odds=objective.preference_weight > 0)


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def printed(row: OneRow, layouts: list[Layout], *, terminal: bool = False, width: int = 80) -> str:
    console = Console(width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    with console.capture() as capture:
        console.print(draw_text(row, layouts, console), soft_wrap=True)
    return capture.get()


def sentencepiece() -> transformers.PreTrainedTokenizerFast:
    """A vocabulary whose decoder takes the leading blank off a text, and falls back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁sea", "▁blue", "s"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# ------------------------------------------------------------------------------------------------ segments


@pytest.mark.parametrize("row", [ROW, PARTING, TEXTS], ids=["turns", "parting", "texts"])
@pytest.mark.parametrize("name", [*SHAPES, None])
def test_segments_joined_are_the_decoded_tokens(name, row):
    tokenizer = tiny_tokenizer(name)
    pair, layout = laid_out(row, tokenizer)
    assert layout.prompt.text + layout.chosen.text == decode(tokenizer, [*pair.prompt, *pair.chosen])
    assert layout.prompt.text + layout.rejected.text == decode(tokenizer, [*pair.prompt, *pair.rejected])
    for part, ids in zip(layout.parts, (pair.prompt, pair.chosen, pair.rejected), strict=True):
        assert [one for segment in part.segments for token in segment.tokens for one in token.ids] == list(
            ids
        )
        assert part.num_tokens() == len(ids)


def test_blanks_and_bytes_of_a_sentencepiece_vocabulary_are_kept():
    tokenizer = sentencepiece()
    blue, sea, end = tokenizer.convert_tokens_to_ids(["▁blue", "▁sea", "</s>"])
    umlaut = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0x96>"])
    pair = TokenizedPair([1, sea], [blue, *umlaut, end], [sea, end])
    layout = lay_out(pair, tokenizer, [])
    assert layout.chosen.text == " blueÖ</s>"
    assert [token.text for token in layout.chosen.segments[0].tokens] == [" blue", "Ö", "</s>"]


def test_half_a_character_stays_in_its_part_and_apart_from_special_tokens():
    tokenizer = sentencepiece()
    first, second, end = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0x96>", "</s>"])
    pair = TokenizedPair([1, first], [second, end], [end, first, end])
    layout = lay_out(pair, tokenizer, [], odds=False)
    texts = [[token.text for one in part.segments for token in one.tokens] for part in layout.parts]
    assert texts == [["<s>", "�"], ["�", "</s>"], ["</s>", "�", "</s>"]]
    assert [token.is_special for token in layout.rejected.segments[0].tokens] == [True, False, True]


@pytest.mark.parametrize("row", [ROW, PARTING, TEXTS], ids=["turns", "parting", "texts"])
@pytest.mark.parametrize("nll_on", ["full", "response", "assistant"])
@pytest.mark.parametrize("beta", [0.1, 0.0])
def test_marks_are_the_tokens_that_packing_scores(row, nll_on, beta):
    objective = Objective(nll_on=nll_on, preference_weight=beta)
    pair, layout = laid_out(row, tiny_tokenizer("llama3"), objective)
    batch = pack([pair], objective, layout="packed")
    targets = (batch.source_T + 1).tolist()
    scored = list(zip(targets, batch.role_T.tolist(), batch.nll_weight_T.tolist(), strict=True))
    first, second = len(pair.prompt) + len(pair.chosen), len(pair.prompt)

    def marked(parts, *roles: Role) -> set[int]:
        of_token = [one.role for part in parts for one in part.segments for _ in range(one.num_tokens)]
        return {index for index, role in enumerate(of_token) if role in roles}

    chosen = (layout.prompt, layout.chosen)
    assert marked(chosen, Role.NLL, Role.BOTH) == {index for index, _, weight in scored if weight > 0}
    odds = {index for index, role, _ in scored if role == Scored.CHOSEN and beta}
    assert marked(chosen, Role.ODDS, Role.BOTH) == odds
    against = {index - first - second for index, role, _ in scored if role == Scored.REJECTED}
    assert marked([layout.rejected], Role.ODDS, Role.BOTH) == against
    assert bool(odds) == bool(against) == (beta > 0)


def test_without_weight_on_the_nll_the_odds_alone_are_marked():
    pair, _ = laid_out(ROW, tiny_tokenizer())
    layout = lay_out(pair, tiny_tokenizer(), [])
    assert {one.role for part in layout.parts for one in part.segments} == {Role.NONE, Role.ODDS}


def test_a_row_without_rejected_answer_has_no_odds():
    _, layout = laid_out(TEXTS | {"rejected": None}, tiny_tokenizer())
    assert layout.rejected is None
    assert {one.role for one in layout.chosen.segments} == {Role.NLL}
    row = shown([TEXTS | {"rejected": None}], sft_rows="use")
    assert "rejected: none; the NLL alone is trained" in printed(row, [layout])


# ------------------------------------------------------------------------------------------------ one row


def test_rows_are_found_by_index_and_by_source(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(TEXTS | {"chosen": f"n{n}"}) for n in range(300)) + "\n")
    for name in ("280", "pairs.jsonl:281", f"{file}:281"):
        row = shown(file, name)
        assert row.source == row.pairs[0].source == "pairs.jsonl:281"
        assert "n280" in decode(tiny_tokenizer(), row.pairs[0].chosen)
    with pytest.raises(DataError, match=r"pairs.jsonl: there is no row 300; it has 300, --row 0 to 299"):
        shown(file, 300)
    with pytest.raises(DataError, match="no row -1"):
        shown(file, "-1")


def test_a_row_is_read_in_the_format_of_its_data_set():
    repeating = {"prompt": "Q: ", "chosen": "Q: yes", "rejected": "Q: no"}
    assert shown([repeating]).format.startswith("standard_repeated ")
    for data, index in (([TEXTS, TEXTS, repeating], 2), ([repeating, TEXTS, TEXTS], 0)):
        row = shown(data, index)
        assert row.format.startswith("standard ")
        assert decode(tiny_tokenizer(), row.pairs[0].chosen).startswith("Q: yes")


def test_texts_are_read_as_all_rows_of_their_data_set_decide(tmp_path):
    file = tmp_path / "pairs.jsonl"
    asks, continues = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}, TEXTS
    for rest, template in (([asks] * 600, "the tokenizer's own; "), ([continues] * 600, "None")):
        rows = [*([asks] * 150), *([continues] * 150), *rest]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for index in (0, 200):
            row = shown(file, index)
            assert str(row.template).startswith(template)
            assert any("text_rows: " in notice for notice in row.notices)
    assert shown(file, 0, text_rows="chat").template.startswith("the tokenizer's own; ")
    assert shown(file, 0, data_format="standard").template is None


def test_what_happened_to_other_rows_is_not_said_of_a_row():
    long = ROW | {"prompt": [turn("user", "word " * 80), turn("assistant", "Yes."), turn("user", "Hi")]}
    empty = ROW | {"chosen": [turn("assistant", " ")]}
    malformed = ROW | {"chosen": 3}
    data = [ROW, long, empty, malformed]
    assert shown(data, 0, max_length=100).outcomes == ()
    assert shown(data, 1, max_length=100).outcomes == (
        ("changed", "oldest turns left out to fit max_length"),
    )
    dropped = shown(data, 2, max_length=100)
    assert (dropped.pairs, dropped.outcomes) == ((), (("dropped", "empty chosen answer"),))
    bad = shown(data, 3, max_length=100)
    assert bad.outcomes[0][0] == "malformed"
    assert "'chosen' is an int" in bad.outcomes[0][1]
    assert "a run stops here, unless on_bad_row: skip" in printed(bad, []).replace("\n            ", " ")


def test_a_row_that_cannot_be_parsed_says_so(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(TEXTS) + '\n{"prompt": "cut\n')
    assert "is not JSON" in printed(shown(file, 1), [])


def test_where_no_row_can_be_used_the_error_names_the_rows_by_their_own_lines(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n\n" + json.dumps(TEXTS | {"chosen": " "}) + "\n")
    for more in ("", "{not json\n"):
        file.write_text(file.read_text() + more)
        with pytest.raises(DataError) as raised:
            shown(file, 0)
        assert str(raised.value).endswith(
            "no row can be used: dropped 1: empty chosen answer (first: pairs.jsonl:3)"
        )


def test_every_pair_of_a_row_is_shown():
    row = shown([{"prompt": "Q", "chosen": "a", "rejected": ["b", "c"]}])
    text = printed(row, [lay_out(pair, tiny_tokenizer(), []) for pair in row.pairs])
    assert "pair 1 of 2, rejected" in text
    assert "pair 2 of 2, rejected" in text


def test_the_template_is_named():
    bare = tiny_tokenizer(None)
    assert shown([TEXTS]).template is None
    assert "template    none: plain text" in printed(shown([TEXTS]), [])
    assert shown([ROW]).template == "the tokenizer's own; turns end with <|im_end|>"
    assert shown([ROW], tokenizer=bare).template == "chatml; turns end with <|im_end|>"
    assert shown([ROW], tokenizer=bare, chat_template="zephyr").template == "zephyr; turns end with </s>"
    given = "{% for m in messages %}" + "{{ m.role + m.content + eos_token }}{% endfor %}"
    assert shown([ROW], chat_template=given).template.startswith("given as text; ")
    assert any("no chat template" in line for line in shown([ROW], tokenizer=bare).notices)


# ------------------------------------------------------------------------------------------------ drawing


def test_no_character_is_hidden():
    assert visible("a\n\tb\r") == "a⏎\n⇥   b␍"
    assert visible("\x1b[31m\u200b\u00a0\u202e\x00") == "⟨U+001B⟩[31m⟨U+200B⟩⟨U+00A0⟩⟨U+202E⟩⟨U+0000⟩"
    assert visible("Möwe 日本 👩\u200d🚀") == "Möwe 日本 👩\u200d🚀"


def test_blanks_at_an_edge_and_special_tokens_stand_out_in_plain_text():
    tokenizer = tiny_tokenizer(None)
    row = shown([TEXTS], tokenizer=tokenizer)
    text = printed(row, [laid_out(TEXTS, tokenizer)[1]])
    assert "not trained «<s>»\n" in text
    assert "NLL         The sea is␣\n" in text
    assert "NLL + odds  ␣wide.␣«</s>»\n" in text
    assert "odds        blue«</s>»\n" in text
    assert "\x1b" not in text


def test_blanks_next_to_a_special_token_within_a_segment_have_a_sign():
    tokens = tuple(Token(text, (0,), text == "<s>") for text in ("  a ", " b ", "<s>", " c", " d "))
    assert draw_segment(Segment(Role.NLL, tokens), marks=True).plain == "␣␣a  b␣«<s>»␣c d␣"


def test_text_that_looks_like_a_special_token_is_not_drawn_as_one():
    tokenizer = tiny_tokenizer(None, special_tokens=False)
    text = printed(shown([ROW], tokenizer=tokenizer), [laid_out(ROW, tokenizer)[1]])
    assert "«<|im_start|>»" not in text
    assert "<|im_start|>" in text
    assert "«</s>»" in text


def test_a_terminal_shows_special_tokens_inverse_and_no_control_character_of_the_data():
    row = TEXTS | {"chosen": "red \x1b[31m\x07", "\x1b[31m": 1}
    text = printed(shown([row]), [laid_out(row, tiny_tokenizer())[1]], terminal=True)
    assert "\x1b[1;7;32m<|im_end|>\x1b[0m" in text
    assert "\x1b[31m" not in text
    assert "\x07" not in text
    assert "«" not in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_none_ends_in_blanks(width):
    row = ROW | {"chosen": [turn("assistant", "word " * 60 + "日本" * 90 + "x" * 300)]}
    layouts = [laid_out(row, tiny_tokenizer())[1]]
    for line in printed(shown([row]), layouts, width=width).splitlines():
        assert cell_len(line) <= width
        assert line == line.rstrip()


class _Page(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "onerror", "style")]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_and_runs_nothing_of_the_data():
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    row = ROW | {"prompt": [turn("user", attack)], attack: 1}
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(attack)
    one = replace(shown([row], tokenizer=tokenizer), source=attack)
    layouts = [laid_out(row, tokenizer)[1]]
    page = draw_page(one, layouts)
    parsed = _Page(page)
    assert not {"script", "img", "link", "iframe"} & set(parsed.tags)
    assert parsed.loads == []
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert attack in parsed.text
    for part in layouts[0].parts:
        assert part.title in parsed.text
    assert one.template_text in parsed.text


def test_page_and_terminal_show_the_same_tokens():
    row = shown([ROW])
    layouts = [laid_out(ROW, tiny_tokenizer())[1]]
    drawn = "".join(_Page(draw_page(row, layouts)).text.split())
    for line in printed(row, layouts, width=500).replace("«", "").replace("»", "").splitlines():
        label, text = line[:12].strip(), line[12:]
        if label in (*Role, ""):
            assert "".join(text.split()) in drawn


def test_dropped_rows_have_a_page_too():
    row = shown([ROW, ROW | {"chosen": [turn("assistant", "")]}], 1)
    assert "empty chosen answer" in draw_page(row, [])


@pytest.mark.parametrize("width", [20, 60, 80, 500])
def test_the_first_pair_in_short_keeps_both_ends_and_fits(width):
    tokenizer = tiny_tokenizer("llama3")
    row = ROW | {"rejected": [turn("assistant", "日本語" * 60)]}
    lines = first_pair_lines(laid_out(row, tokenizer)[0], tokenizer, width)
    assert [line.split()[0] for line in lines] == ["prompt", "chosen", "rejected"]
    assert all(cell_len(line) <= width for line in lines)
    if width >= 60:
        assert lines[0].startswith("prompt     <|begin_of_text|>")
        assert all(line.endswith("<|eot_id|>") for line in lines[1:])
        assert lines[0].endswith("⏎⏎")
    assert (" … " in lines[0]) == (width < 500)
    alone = first_pair_lines(TokenizedPair([1], [2], []), tokenizer, width)
    assert alone[2] == "rejected   (none)"


# ------------------------------------------------------------------------------------------------ command


def test_the_command_prints_a_pair_of_the_demo_and_writes_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    page = tmp_path / "row.html"
    words = ["data", "show", DEMO / "data/politeness/train.jsonl", "--row", "train.jsonl:1"]
    words += ["--model", DEMO / "model", "--html", page, "--nll_on", "response"]
    assert cli.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("row         train.jsonl:1\nformat      standard (")
    assert "note        texts are read as a user turn and an answer" in printed
    assert "prompt: 29 tokens\nnot trained «<|startoftext|>»«<|user|>»Rewrite the following" in printed
    assert "NLL + odds  The fact is that he was late.«<|end|>»" in printed
    assert "odds        Face it, he was late.«<|end|>»" in printed
    *lines, last = printed.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert last == f"page        {page}"
    assert "Face it" in "".join(_Page(page.read_text(encoding="utf-8")).text)


def test_data_without_a_word_lists_its_words(capsys):
    assert cli.main(["data"]) == 0
    assert "show" in capsys.readouterr().out.partition("words:")[2]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["/nothing.jsonl", "--model", "M"], "no such file"),
        (["{file}"], "no model is named, and a pair has the tokens of one; add --model M"),
        (
            ["{file}", "--model", "{model}", "--html", "/no/such/folder/x.html"],
            "--html /no/such/folder/x.html",
        ),
        (["{file}", "--model", "{model}", "--max_lenght", "9"], "did you mean 'max_length'"),
        (["{file}", "--model", "{model}", "--data_format", "hh"], "orpo: error: rows: "),
        (["{file}", "--model", "{model}", "--row", "7"], "there is no row 7; it has 1, --row 0 to 0"),
    ],
)
def test_a_mistake_is_one_line(words, line, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(TEXTS) + "\n")
    words = [word.format(file=file, model=DEMO / "model") for word in words]
    assert cli.main(["data", "show", *words]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


def test_a_recipe_decides_and_the_command_line_beats_it(tmp_path, capsys):
    file, recipe = tmp_path / "pairs.jsonl", tmp_path / "recipe.yaml"
    file.write_text(json.dumps(ROW) + "\n")
    recipe.write_text(f"model_name_or_path: {DEMO / 'model'}\nnll_on: response\nbeta: 0\n")
    words = ["data", "show", str(file), "--recipe", str(recipe)]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "tokens\nnot trained «<|startoftext|>»«<|user|>»What" in text
    assert "rejected: 7 tokens\nnot trained No, I will" in text
    assert "odds" not in text  # nor in the legend
    assert cli.main([*words, "--beta", "0.2", "--nll_weight", "0"]) == 0
    text = capsys.readouterr().out
    assert "rejected: 7 tokens, 7 in the odds" in text
    assert "in the NLL" not in text


def test_a_split_of_the_recipe_is_for_its_own_data_alone(tmp_path, capsys):
    recipe, own, other = tmp_path / "recipe.yaml", tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text(json.dumps(ROW) + "\n")
    named = f"model_name_or_path: {DEMO / 'model'}\ndataset_name: {own}\n"
    recipe.write_text(named + "dataset_train_split: test\n")
    for folder, source in ((own, "test.jsonl:1"), (other, "train.jsonl:1")):
        assert cli.main(["data", "show", str(folder), "--recipe", str(recipe)]) == 0
        said = capsys.readouterr()
        assert said.out.startswith(f"row         {source}\n")
        assert ("dataset_train_split: of " in said.err) == (folder == other)


def test_a_run_directory_shows_what_it_trained_on(tmp_path, capsys):
    file, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    file.write_text(json.dumps(ROW) + "\n")
    shutil.copytree(DEMO / "model", run)
    (run / "recipe.yaml").write_text("nll_on: response\n")
    assert cli.main(["data", "show", str(file), "--model", str(run)]) == 0
    assert "tokens\nnot trained «<|startoftext|>»«<|user|>»What" in capsys.readouterr().out


def test_tokens_that_resize_embeddings_adds_are_shown_as_such(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    words = ["data", "show", str(file), "--model", str(DEMO / "model"), "--chat_template", "chatml"]
    assert cli.main(words) == 0
    assert "«<|im_end|>»" not in capsys.readouterr().out
    assert cli.main([*words, "--resize_embeddings"]) == 0
    assert "«<|im_end|>»" in capsys.readouterr().out
