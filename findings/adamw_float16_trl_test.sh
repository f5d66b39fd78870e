#!/usr/bin/env bash
# A model loaded as float16 and trained by TRL's ORPOTrainer with its defaults and a learning rate of 0.1 (what TRL's
# own test of dtypes does) ends with every weight not a number, and no error: train_loss is an ordinary number, and a
# test that only asks whether each weight has changed passes, since NaN differs from what was there. AdamW keeps the
# squares of gradients in the dtype of the weights, and in float16 those of gradients below about 2e-4 are 0.
# The way out: float32 weights and fp16=True, or bfloat16.
# Seen with trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11, 2026-11-28:
#     train_loss is finite: True
#     weights that changed: 23 of 23, not a number: 23
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PYTHON' 2>/dev/null | tail -n 2
import math

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(40))]
words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
torch.manual_seed(0)
config = Qwen2Config(vocab_size=44, hidden_size=8, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, eos_token_id=2, pad_token_id=0, bos_token_id=1)
model = Qwen2ForCausalLM(config).to(torch.float16)
rows = [{"prompt": f"{n} is", "chosen": f" {n + 1} {n + 2}", "rejected": f" {n + 3}"} for n in range(17)]
before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
trainer = ORPOTrainer(
    model=model, args=ORPOConfig(output_dir="out", learning_rate=0.1, report_to="none", bf16=False, use_cpu=True),
    train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
)
trainer.train()
loss = trainer.state.log_history[-1]["train_loss"]
weights = {name: weight for name, weight in model.named_parameters() if "layernorm" not in name}
changed = sum(not torch.equal(weight, before[name]) for name, weight in weights.items())
lost = sum(bool(weight.isnan().any()) for weight in weights.values())
print("train_loss is finite:", math.isfinite(loss))
print(f"weights that changed: {changed} of {len(weights)}, not a number: {lost}")
assert math.isfinite(loss) and changed == lost == len(weights), "the behaviour has changed"
PYTHON
