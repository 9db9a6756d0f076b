"""load: reads and checks gpt-oss, puts the live Policy in the session, and writes down what was read.

    python -m stages.load --run-dir R

Writes model.json: architecture, how the weights are held, and the sha256 of every file of the checkpoint. The weights
stay where they are: a later stage, in this process or another, builds its Policy from the same checkpoint and is
refused when a digest differs.
"""

import json
import time

from stages.artifacts import StageContext
from stages.artifacts.command import main as command_main
from stages.model.policy import open_policy


def run(context: StageContext) -> None:
    """Writes model.json. Raises UserError naming what is wrong with the checkpoint."""
    started = time.perf_counter()
    policy = open_policy(context)
    config = policy.model.config
    manifest = {
        "source": policy.source,
        "architecture": {
            "model_type": config.model_type,
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_experts": config.num_local_experts,
            "experts_per_token": config.num_experts_per_tok,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "sliding_window": config.sliding_window,
            "vocab_size": config.vocab_size,
        },
        "held_as": {
            "experts": context.config.model.experts,
            "dense": context.config.model.dense,
            "dtype": str(policy.dtype),
        },
        "weight_bytes": policy.weight_bytes(),
        "adapter": {
            "rank": policy.lora_rank,
            "alpha": policy.lora_alpha,
            "parameters": sum(parameter.numel() for _, parameter in policy.parameters()),
        },
        "files": policy.checkpoint_digests,
    }
    (context.out / "model.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    context.timings.append({"what": "load", "seconds": time.perf_counter() - started})
    context.progress(1, 1, "model", MB=round(policy.weight_bytes() / 1e6, 1))


def main() -> None:
    command_main("load", run)


if __name__ == "__main__":
    main()
