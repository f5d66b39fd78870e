#!/usr/bin/env bash
# transformers 5 holds all experts of a layer in one tensor, and save_pretrained writes a tensor for each under the
# names of the family's first release. from_pretrained turns that back; Trainer does not: it reads the file as it is,
# with strict=False. So resuming the training of a mixture of experts, all weights, takes attention and embeddings from
# the checkpoint and leaves experts and router as the model has them, those before training in a fresh process. The
# only sign is a warning about missing keys. load_best_model_at_end mixes two checkpoints in the same way.
# The way out: from_pretrained(checkpoint) by hand, or save_pretrained(save_original_format=False).
# Seen with transformers 5.23.0, accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11, 2026-11-28; two steps, then two
# more, against four in one go:
#     Llama: 0 of 21 weights differ
#     Mixtral: 21 of 21 weights differ; as the checkpoint is read, 6 of 21 are not those in it
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PYTHON' 2>/dev/null | grep differ
import torch
from transformers import (
    LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments,
)

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0)
rows = [{"input_ids": [1 + (n * k) % 60 for k in range(1, 9)]} for n in range(1, 17)]
rows = [row | {"labels": row["input_ids"]} for row in rows]


def run(kind, config, folder, resume):
    torch.manual_seed(0)
    model = kind(config)
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant",
        save_strategy="steps", save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    return model


def differing(one, other):
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    return sum(not torch.equal(a, b) for a, b in pairs), len(pairs)


found = {}
for kind, config in (
    (LlamaForCausalLM, LlamaConfig(**sizes)),
    (MixtralForCausalLM, MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)),
):
    name = kind.__name__.removesuffix("ForCausalLM")
    whole = run(kind, config, name, False)
    number, of = differing(whole, run(kind, config, name, True))
    line = f"{name}: {number} of {of} weights differ"
    torch.manual_seed(0)
    read = kind(config)
    Trainer(model=read, args=TrainingArguments(name, report_to=[], use_cpu=True))._load_from_checkpoint(
        f"{name}/checkpoint-2"
    )
    lost, _ = differing(kind.from_pretrained(f"{name}/checkpoint-2"), read)
    print(line if not lost else f"{line}; as the checkpoint is read, {lost} of {of} are not those in it", flush=True)
    found[name] = number, lost
assert found["Llama"] == (0, 0) and min(found["Mixtral"]) > 0, "the behaviour has changed"
PYTHON
