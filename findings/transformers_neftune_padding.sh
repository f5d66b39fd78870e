#!/usr/bin/env bash
# NEFTune (arXiv 2310.05914) adds noise of at most alpha / sqrt(L * d) to embeddings, L being the length of the text.
# transformers (`neftune_noise_alpha`, which TRL's trainers take) uses the width of the batch instead. So a text gets less
# noise the longer the longest text beside it is, padding included, and next to none where texts are packed into one line
# without padding (DataCollatorWithFlattening, TRL's packing): batch size and collator change the regularisation, and
# nothing says so.
# The way out: scale alpha by sqrt(width / length), or add the noise by a hook that knows where texts begin.
# Seen with transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11, 2026-11-28, alpha 5, hidden size 64, a text of 8 tokens:
#     alone                       0.2210
#     beside one of 512, padded   0.0276
#     packed with 63 like it      0.0276
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PYTHON' 2>/dev/null | tail -n 3
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import activate_neftune

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
)).train()
embeddings = model.get_input_embeddings()
text = [5, 6, 7, 8, 9, 10, 11, 12]
padded = torch.zeros(2, 512, dtype=torch.long)
padded[0, :8], padded[1] = torch.tensor(text), 3
packed = DataCollatorWithFlattening()([{"input_ids": text} for _ in range(64)])["input_ids"]
batches = {
    "alone": torch.tensor([text]), "beside one of 512, padded": padded, "packed with 63 like it": packed,
}
plain = {name: embeddings(ids)[0, :8] for name, ids in batches.items()}
activate_neftune(model, 5.0)
found = {}
for name, ids in batches.items():
    found[name] = max((embeddings(ids)[0, :8] - plain[name]).abs().max().item() for _ in range(200))
    print(f"{name:28}{found[name]:.4f}")
assert abs(found["alone"] - 5 / (8 * 64) ** 0.5) < 1e-3, "the behaviour has changed"
for name in ("beside one of 512, padded", "packed with 63 like it"):
    assert abs(found[name] - 5 / (512 * 64) ** 0.5) < 1e-3, "the behaviour has changed"
PYTHON
