"""Tiny random models of many architectures, with weights large enough for attention and biases to matter."""

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from orpo.pairs import TokenizedPair

VOCAB = 97
WINDOW = 6
"""Sliding window of the models that have one; shorter than the sides of `mixed_pairs`."""

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

SHARING = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "attn_implementation": "eager",  # before transformers 5.2x, sdpa leaves the cap out
    },
    "Gemma3Text": {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 6},
    "Phi": {},
    "Phi3": {"sliding_window": WINDOW},
    "GPT2": {**_GPT, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "Olmo2": {},
    "Olmo3": {"sliding_window": WINDOW},
    "Starcoder2": {"sliding_window": WINDOW},
    "Mixtral": _MIXTURE,
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25, "head_dim": 8, "sliding_window": WINDOW},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "DeepseekV3": _LATENT,
    "Ernie4_5": {},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "StableLm": {},
    "SmolLM3": {},
    "Glm4": {"head_dim": 8},
    "GptOss": {**_MIXTURE, "head_dim": 8, "sliding_window": WINDOW},
}
"""Architectures whose micro-batches share prompts exactly."""

FALLING_BACK = {
    "Mamba": {"state_size": 4},
    "GPTNeo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
    },
    "Falcon": {},
    "Bloom": {"n_layer": 2, "n_head": 4},
}
"""Architectures that cannot follow a packed micro-batch."""


def build(name: str, **changes: object) -> PreTrainedModel:
    """A model in float32, the same at every call, in evaluation mode (no dropout)."""
    config_class = getattr(transformers, f"{name}Config")
    settings = {**_COMMON, **(SHARING | FALLING_BACK)[name], **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_class(**settings))
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            with torch.no_grad():
                if parameter.ndim > 1:
                    parameter.copy_(0.2 * noise)
                else:
                    parameter += 0.1 * noise
    return model.eval()


def token_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def mixed_pairs() -> list[TokenizedPair]:
    """Unlike lengths: one token, longer than the window, no rejected side, turns of their own."""
    return [
        TokenizedPair(token_ids(7, 1), token_ids(5, 2), token_ids(3, 3), assistant_spans=((0, 2), (4, 6))),
        TokenizedPair(token_ids(1, 4), token_ids(1, 5), token_ids(9, 6)),
        TokenizedPair(token_ids(12, 7), token_ids(14, 8), token_ids(4, 9), assistant_spans=((3, 8),)),
        TokenizedPair(token_ids(4, 10), token_ids(3, 11), []),
        TokenizedPair(
            token_ids(3, 12),
            token_ids(9, 13),
            token_ids(7, 14),
            chosen_context=5,
            rejected_context=4,
            assistant_spans=((1, 3), (5, 7)),
        ),
    ]
