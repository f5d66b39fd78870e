#!/usr/bin/env bash
# A run of transformers' Trainer that resumes goes by the eval_steps, save_steps and logging_steps of its checkpoint
# (trainer_state.json), not by those it is told now: the state that is read takes the place of the one made from the
# arguments. A warning lists both numbers and does not say which one counts; the arguments themselves, and what is
# written of them, keep the new ones. So "resume, but evaluate more often" changes nothing.
# The way out: trainer.state.compute_steps(args, max_steps) once the state is read (override _init_training_state).
# Seen with transformers 5.23.0, accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11, 2026-11-28; stopped after step 4
# of 8, then resumed with every number at 1:
#     args.eval_steps 1: evaluated at [8], saved at [8], logged at [8]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PYTHON' 2>/dev/null | grep evaluated
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                     pad_token_id=0)
rows = [{"input_ids": [1 + (n * k) % 60 for k in range(1, 9)]} for n in range(1, 17)]
rows = [row | {"labels": row["input_ids"]} for row in rows]


class StopAtFour(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def trainer(every, callbacks=()):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        "run", max_steps=8, per_device_train_batch_size=4, eval_strategy="steps", save_strategy="steps",
        logging_strategy="steps", eval_steps=every, save_steps=every, logging_steps=every, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=rows, eval_dataset=rows[:4],
                   callbacks=list(callbacks))


trainer(4, [StopAtFour()]).train()
again = trainer(1)
again.train(resume_from_checkpoint=True)
later = [line for line in again.state.log_history if line["step"] > 4]
evaluated = [line["step"] for line in later if "eval_loss" in line]
logged = [line["step"] for line in later if "loss" in line]
saved = sorted(int(path.name.split("-")[1]) for path in Path("run").glob("checkpoint-*"))
saved = [step for step in saved if step > 4]
print(f"args.eval_steps {again.args.eval_steps}: evaluated at {evaluated}, saved at {saved}, logged at {logged}",
      flush=True)
assert again.args.eval_steps == 1 and evaluated == saved == logged == [8], "the behaviour has changed"
PYTHON
