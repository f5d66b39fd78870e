#!/usr/bin/env bash
# LoRA on all linear layers of Gemma 3n, as PEFT's "all-linear" puts it there, includes AltUp's correction_coefs. While
# the model trains, transformers clips that layer's own weight and multiplies by it directly, so the adapter on it is
# passed over: its matrices get no gradient, and nothing says so. In evaluation mode the adapter is used and would get
# one. The layer beside it, prediction_coefs, trains in both modes.
# The way out: leave correction_coefs out of target_modules, or set altup_coef_clip to null in the configuration.
# Seen with transformers 5.23.0, peft 0.21.2, torch 2.13.0 (CPU), Python 3.11, 2026-11-28:
#     training:   correction_coefs 0 of 4 adapters have a gradient, prediction_coefs 4 of 4
#     evaluation: correction_coefs 4 of 4 adapters have a gradient, prediction_coefs 4 of 4
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PYTHON' 2>/dev/null | tail -n 2
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

torch.manual_seed(0)
config = Gemma3nTextConfig(
    vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, laurel_rank=4,
    altup_num_inputs=2, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.0] * 4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = get_peft_model(Gemma3nForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
found = {}
for mode in ("training", "evaluation"):
    model.train(mode == "training")
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found[mode] = {}
    for layer in ("correction_coefs", "prediction_coefs"):
        weights = [w for name, w in model.named_parameters() if layer in name and "lora_B" in name]
        found[mode][layer] = (sum(w.grad is not None and bool(w.grad.any()) for w in weights), len(weights))
    said = ", ".join(
        f"{layer} {a} of {b}{' adapters have a gradient' if layer == 'correction_coefs' else ''}"
        for layer, (a, b) in found[mode].items()
    )
    print(f"{mode + ':':12}{said}")
assert found["training"] == {"correction_coefs": (0, 4), "prediction_coefs": (4, 4)}, "the behaviour has changed"
assert found["evaluation"] == {"correction_coefs": (4, 4), "prediction_coefs": (4, 4)}, "the behaviour has changed"
PYTHON
