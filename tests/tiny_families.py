"""Tiny random models of any causal family that transformers has, made from its configuration class."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 97

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "n_inner": 48,
    "d_ff": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "ffn_hidden_size": 16,
    "expert_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size":
    16, "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4,
    "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "attention_head_size": 8, "swa_head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2,
    "d_head": 8, "attention_head_dim": 8, "max_position_embeddings": 256, "n_positions": 256, "n_ctx":
    256, "max_seq_len": 256, "seq_length": 256, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim":
    8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_local_experts": 4,
    "num_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2,
    "moe_topk": 2, "top_k": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "n_groups": 1,
    "num_expert_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "decoder_sparse_step": 1, "zero_expert_num": 1, "mamba_n_heads": 4, "mamba_num_heads": 4,
    "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_headdim": 16, "n_mamba_heads": 2, "mamba_ngroups": 1,
    "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_expand": 2, "expand": 2,
    "state_size": 8, "ssm_state_size": 8, "conv_kernel": 4, "conv_L_cache": 3, "mamba_chunk_size": 16,
    "chunk_size": 16, "mamba_dt_rank": 4, "time_step_rank": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "block_size": 16, "rotary_dim": 4, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4, "altup_num_inputs": 2, "altup_active_idx": 0,
    "num_kv_shared_layers": 0, "lru_width": 32, "attention_window_size": 6, "sliding_window": 6,
    "attention_chunk_size": 400, "adapter_rank": 4, "num_mem_blocks": 1, "index_n_heads": 2,
    "index_head_dim": 16, "index_topk": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "word_embed_proj_dim": 32, "embedding_size": 32,
    "num_nextn_predict_layers": 0, "query_pre_attn_scalar": 8, "ffn_config": None,
}  # fmt: skip

_OF_FAMILY: dict[str, dict[str, Any]] = {
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_heads": 4, "lm_head_multiplier": 0.04},
    "zamba2": {
        "n_mamba_heads": 4,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "hyperclovax": {"logits_scaling": 0.125},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "reformer": {  # every attention in chunks, some of them of hashed neighbours
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 48,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 128},  # widths of queries and values are multiples of 64
    "zaya": {
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "dbrx": {  # the attention reads a base that its configuration lacks
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "cohere_compass_text": {
        "logit_scale": 0.25,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,  # these layers have no positions
        },
    },
    "blt": {  # its cache wants a number of layers that its configuration lacks
        "use_cache": False,
        "encoder_hash_byte_group_vocab": VOCAB,
        "local_attention_window_len": 6,
    },
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "dots3_note_text": {
        "head_dim": 16,
        "shared_experts_intermediate_size": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    },
    "dots3_note_audio_encoder": {
        "downsample_hidden_size": 8,
        "adapter_input_size": 32,
        "adapter_out_dim": 32,
    },
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 1,
    },
    "llama4_text": {"moe_layers": [1, 3], "intermediate_size_mlp": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "nemotron_h": {
        "hybrid_override_pattern": "M*-M",
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
    },
}
"""What a family needs besides; several of them so that what is odd about it shows."""


def config_of(family: str, **changes: Any) -> Any:
    """A tiny configuration of the family."""
    return _tiny(transformers.CONFIG_MAPPING[family], _OF_FAMILY.get(family, {}) | changes)


def _tiny(kind: Any, changes: dict[str, Any]) -> Any:
    """A tiny configuration of a kind, those of its parts included."""
    known = vars(kind())
    names = {*known, *getattr(kind, "attribute_map", {})}
    settings = {name: value for name, value in _SIZES.items() if name in names and value is not None}
    for name, value in known.items():
        if "drop" in name and isinstance(value, float):
            settings[name] = 0.0
    if "kv_lora_rank" in settings:  # latent attention: a key for each head, of two parts
        settings["num_key_value_heads"] = 4
        settings.pop("head_dim", None)
    for name, value in known.items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = _tiny(type(value), _OF_FAMILY.get(value.model_type, {}))
    for name in ("is_decoder", "causal"):  # an encoder, unless it is told otherwise
        if known.get(name) is False:
            settings[name] = True
    settings |= changes
    if "layer_types" in known and "layer_types" not in settings:
        given = known["layer_types"] or []
        kinds = list(dict.fromkeys(given))
        if kinds:
            settings["layer_types"] = (kinds * 4)[: settings.get("num_hidden_layers", 4)]
    return kind(**settings)


def num_weights(family: str) -> int:
    """Weights of the tiny model; none is made."""
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config_of(family)).num_parameters())


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A model in float32 and evaluation mode, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(family, **changes))
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "A_log" not in name and weight.is_floating_point():
                weight.data = 0.2 * torch.randn_like(weight)
            elif weight.ndim == 1 and "A_log" not in name and name.rpartition(".")[2] not in ("D", "dt_bias"):
                weight.data += 0.1 * torch.randn_like(weight)
    return model.eval()
