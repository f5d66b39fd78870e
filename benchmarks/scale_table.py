"""The tables of docs/scale.md: runs of 7, 70 and 141 billion weights on 1 to 32 nodes, by `orpo plan`.

python benchmarks/scale_table.py
"""

from typing import Any

from orpo.plan.lengths import drawn_lengths
from orpo.plan.machine import cluster
from orpo.plan.on_paper import paper_model
from orpo.plan.plan import GIB, Plan, lay_out
from orpo.settings.config import OrpoSettings

SHARDED: dict[str, Any] = {
    "gradient_checkpointing": True, "fsdp": "full_shard auto_wrap", "eval_strategy": "no",
    "num_train_epochs": 1,
}  # fmt: skip
EIGHT_BIT = {"dtype": "bfloat16", "optim": "adamw_bnb_8bit", "num_train_epochs": 3}
RUNS = (
    ("7B", "mistralai/Mistral-7B-v0.1", SHARDED, "149/304/304", 61135, 256),
    ("70B", "meta-llama/Llama-3.1-70B", SHARDED, "149/304/304", 61135, 256),
    ("8x22B", "mistral-community/Mixtral-8x22B-v0.1", SHARDED | EIGHT_BIT, "700/300/300", 6932, 32),
)
"""Title, model, settings, mean tokens, pairs, pairs of a step."""
NODES = (1, 2, 4, 8, 16, 32)


def row(plan: Plan) -> str:
    """One line of a table."""
    memory = plan.memory
    states = (memory.weights + memory.gradients + memory.optimizer) / GIB
    rest = (memory.activations + memory.head + memory.gathered) / GIB
    talk = plan.talk_bytes / plan.cluster.bandwidth
    cells = (
        plan.cluster.nodes, f"{states:.1f}", f"{rest:.1f}", f"{memory.peak / GIB:.1f}",
        "yes" if plan.fits else "no",
        plan.pairs_per_step, f"{plan.micro_batches:.1f}", f"{plan.talk_bytes / 1e9:,.0f}", f"{talk:.2f}",
        f"{plan.step_seconds:.2f}", f"{plan.hours:.2f}", f"{plan.cost:,.0f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the tables."""
    for title, name, settings, means, pairs, per_step in RUNS:
        given = settings | {"model_name_or_path": name}
        own = OrpoSettings.from_recipe(given)
        model = paper_model(own, has_bf16=True, autocast=True, by_kernel=True)
        lengths = drawn_lengths(means, pairs, given)
        plans = []
        for nodes in NODES:
            each = {"per_device_train_batch_size": max(1, per_step // (8 * nodes))}
            plans.append(lay_out(given | each, model, cluster("h100-80", 8, nodes), lengths))
        first = plans[0]
        print(
            f"\n{title}: {name}, {first.model.num_weights:,} weights, {lengths.num_pairs:,} pairs of {means}"
            f" tokens, {first.operations:.2e} FLOP in {first.steps} steps of {first.pairs_per_step} pairs;"
            f" checkpoint {first.checkpoint / GIB:.0f} GiB"
        )
        print(
            "| nodes | states | rest | peak | fits | pairs a step | batches | GB sent | s | step s | h | $ |"
        )
        print("|" + "---|" * 12)
        print("\n".join(map(row, plans)))
    published = 6932 * 3 / 32
    operations = first.work.training * first.work.separate_tokens / first.work.tokens * 32
    print(
        f"\nZephyr-ORPO-141B: 6,932 pairs, 3 epochs, 32 pairs a step: {published:.0f} steps in 1.3 hours are"
        f" {1.3 * 3600 / published:.1f} s each; with prompts read twice {operations / 1e15:.1f} PFLOP a step,"
        f" {operations / (1.3 * 3600 / published) / (32 * 989e12):.1%} of the peak of 32 H100"
    )
    for mfu in (0.4, operations / (1.3 * 3600 / published) / (32 * 989e12)):
        each = {"per_device_train_batch_size": 1}
        plan = lay_out(given | each, model, cluster("h100-80", 8, 4, mfu=mfu), lengths)
        print(
            f"planned at {mfu:.1%}: {plan.hours:.2f} hours, balance {plan.balance:.2f},"
            f" peak {plan.memory.peak / GIB:.1f} GiB"
        )


if __name__ == "__main__":
    main()
