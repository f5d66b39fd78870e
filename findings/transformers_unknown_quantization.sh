#!/usr/bin/env bash
# A config.json whose quantization_config names a method that transformers does not know (of a newer release, of another
# library, or misspelt) is no error: the entry is passed over with a warning in the log, and the tensors in the files
# are loaded as plain weights. With verbosity set to errors, as training scripts do, nothing is said at all. Trained on,
# such a model is whatever its packed numbers mean as plain ones, where shapes happen to fit.
# Seen with transformers 5.23.0, torch 2.13.0, Python 3.11, 2026-11-27:
#     loaded LlamaForCausalLM, weights equal to the file's: True, is_quantized: False
# The way out: look the method up in transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING before loading.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$place"
"$place/venv/bin/python" - <<'PYTHON' 2>/dev/null
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(config)
model.save_pretrained("model")
file = Path("model/config.json")
file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "tomorrow"}}))

loaded = AutoModelForCausalLM.from_pretrained("model")
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
quantized = bool(getattr(loaded, "is_quantized", False))
print(f"loaded {type(loaded).__name__}, weights equal to the file's: {same}, is_quantized: {quantized}")
assert same and not quantized, "the behaviour has changed"
PYTHON
