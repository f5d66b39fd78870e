#!/usr/bin/env bash
# An adapter folder may hold a generation_config.json (a trainer wrote there which tokens end an answer), and
# transformers reads it from that folder when asked. AutoPeftModelForCausalLM does not: the model generates with the
# base model's generation_config, so answers run past the end of turn that the adapter was trained to write.
# Seen with peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11, 2026-11-27:
#     in the adapter folder: [5, 2]
#     what the loaded model stops at: 2
# The way out: model.generation_config = GenerationConfig.from_pretrained(adapter_folder)
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$place"
"$place/venv/bin/python" - <<'PYTHON' 2>/dev/null
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
base = LlamaForCausalLM(config)
base.generation_config = GenerationConfig(eos_token_id=2)
base.save_pretrained("base")
adapted = get_peft_model(LlamaForCausalLM.from_pretrained("base"), LoraConfig(r=2, target_modules=["q_proj"]))
adapted.save_pretrained("adapter")
GenerationConfig(eos_token_id=[5, 2]).save_pretrained("adapter")

saved = GenerationConfig.from_pretrained("adapter").eos_token_id
loaded = AutoPeftModelForCausalLM.from_pretrained("adapter").generation_config.eos_token_id
print("in the adapter folder:", saved)
print("what the loaded model stops at:", loaded)
assert saved == [5, 2] and loaded == 2, "the behaviour has changed"
PYTHON
