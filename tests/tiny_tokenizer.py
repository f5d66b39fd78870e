# ruff: noqa: E501 - templates read better unbroken
"""A small byte-level BPE tokenizer, trained here, with the special tokens of the usual chat templates.

`tiny_tokenizer("chatml")` is a `PreTrainedTokenizerFast` whose template is shaped like that family's: written
for these tests after the published behaviour, the trailing newlines, BOS, trimming and refusals included.
"""

import functools
import json

import tokenizers
import transformers

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<bos>", "<eos>", "<pad>",
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]",
]  # fmt: skip

TEXT = """Human: What is the capital of France? Assistant: The capital of France is Paris, a city on the river Seine.
Human: Could you please write a short poem about the sea? Assistant: Of course, here it is. The sea is wide
and blue, the wind is never still, the boats go out at break of day and come back home at will. Human: How do
I boil an egg? Assistant: Put the egg into boiling water, wait for seven minutes, then cool it. You are a
helpful assistant. def add(a, b):\n    return a + b\n\n\nNo, I will not help with that. Yes, certainly! 1, 2,
3, 4, 5. {"name": "x"}
user system assistant tool model question answer chosen rejected instruction response: "quoted" and (bracketed)."""

_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"

SHAPES: dict[str, tuple[str | None, str, str]] = {
    # name: (bos, eos, template)
    "chatml": (
        None,
        "<|im_end|>",
        "{% for m in messages %}" + _TURN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    # Qwen3: an empty think block in the last answer, thinking of earlier turns removed.
    "think": (
        None,
        "<|im_end|>",
        "{% set ns = namespace(last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
        "{{ '<|im_start|>assistant\\n' }}"
        "{% if loop.index0 > ns.last %}"
        "{{ '<think>\\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip('\\n')"
        " if '</think>' in m.content else '') + '\\n</think>\\n\\n' }}{% endif %}"
        "{{ said + '<|im_end|>\\n' }}"
        "{% else %}" + _TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    # A reasoning model's header opens the thinking when asked, but earlier answers are written without it.
    "asks_to_think": (
        None,
        "<|im_end|>",
        "{% for m in messages %}" + _TURN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
    ),
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
        " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
    "gemma": (
        "<bos>",
        "<eos>",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n'"
        " + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ),
    "phi3": (
        "<s>",
        "<|endoftext|>",
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    # Mistral v0.3: the system text moves into the last user turn.
    "mistral": (
        "<s>",
        "</s>",
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
        "{% for m in rest %}{% if m['role'] == 'user' %}"
        "{% if system is defined and (loop.last or loop.index0 == rest | length - 2) %}"
        "{{ '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}",
    ),
    "zephyr": (
        "<s>",
        "</s>",
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
    ),
    # No end-of-turn token at all.
    "alpaca": (
        "<s>",
        "</s>",
        "{% for m in messages %}{{ '### ' + ('Response' if m['role'] == 'assistant' else 'Instruction') + ':\\n'"
        " + m['content'] + '\\n\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    ),
}


@functools.cache
def _trained() -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512 + 128,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    template_name: str | None = "chatml",
    *,
    pad_is_eos: bool = False,
    adds_bos: bool | None = None,
    special_tokens: bool = True,
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer shaped like one family's.

    Args:
        template_name: One of `SHAPES`; None: no chat template, as a base model's.
        pad_is_eos: Pad with the EOS token.
        adds_bos: Put BOS in front of plain text; unset: where the shape has a BOS.
        special_tokens: Hold the chat templates' tokens in the vocabulary; else only BOS, EOS, pad and unk.
    """
    bos, eos, template = SHAPES[template_name] if template_name else ("<s>", "</s>", None)
    backend = tokenizers.Tokenizer.from_str(_trained())
    kept = (
        SPECIAL if special_tokens else [token for token in SPECIAL if token in (bos, eos, "<pad>", "<unk>")]
    )
    backend.add_special_tokens(kept)
    if bos is not None and adds_bos is not False:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos if pad_is_eos else "<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def vocabulary(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, int]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
