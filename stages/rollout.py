"""rollout: the engine samples a group of completions for each prompt.

    python -m stages.rollout --run-dir R --iteration 3

Writes rollouts-*.parquet, with the experts that the engine chose where the update will replay them. Every finished
completion is journalled at once, so a killed rollout goes on with what is missing, and since a completion's tokens
depend on its own seed alone, the result is the same. Where the session has it enabled, its program goes to the
sandboxes at the same time (stages/tasks/early.py); no verdict is waited for.
"""

import base64
import time
from collections.abc import Mapping
from typing import Any

from stages.artifacts import StageContext, derive
from stages.artifacts.command import main as command_main
from stages.artifacts.parquet import ROLLOUTS, write_parts
from stages.engine import Completion, Request, live_engine, sampling_of
from stages.model.policy import live_policy
from stages.tasks import registry
from stages.tasks.early import early_judging


def run(context: StageContext) -> None:
    """Samples P prompts x G completions of iteration `context.stage.index` with the policy of that version."""
    config, iteration = context.config, context.stage.index
    assert iteration is not None
    policy = live_policy(context, iteration)
    task = registry.of(config)
    prompts = task.prompts(config.rollout.prompts, iteration, config.train.seed)
    rows: dict[str, dict[str, Any]] = {}
    requests = []
    for group, prompt in enumerate(prompts):
        prompt_ids = policy.render(prompt.messages)
        for sample in range(config.rollout.group_size):
            completion_id = f"{iteration:05d}-{group:03d}-{sample:03d}"
            sampling = sampling_of(config, policy, seed=derive("sample", config.train.seed, completion_id))
            requests.append(Request(completion_id=completion_id, prompt_ids=prompt_ids, sampling=sampling))
            rows[completion_id] = {
                "completion_id": completion_id,
                "prompt_id": prompt.prompt_id,
                "group_index": group,
                "sample_index": sample,
                "iteration": iteration,
                "policy_version": policy.version,
                "task": task.name,
                "prompt": policy.decode(prompt_ids),
            }

    journal = context.journal("completions")
    finished: dict[str, dict[str, Any]] = {str(record["completion_id"]): record for record in journal.records()}
    missing = [request for request in requests if request.completion_id not in finished]
    num_tokens, started = 0, time.perf_counter()
    early = early_judging(context)
    early.open(context, task)

    def judge_early(record: Mapping[str, Any]) -> None:
        completion_id = record["completion_id"]
        early.start(completion_id, rows[completion_id]["group_index"], policy.decode(record["completion_ids"]))

    def keep(completion: Completion) -> None:
        record = record_of(completion)
        journal.append(record)
        finished[completion.completion_id] = record
        judge_early(record)
        report()

    def count(sampled: int) -> None:
        nonlocal num_tokens
        num_tokens += sampled

    def report() -> None:
        rate = num_tokens / max(time.perf_counter() - started, 1e-9)
        context.progress(len(finished), len(requests), "completions", **{"tokens/s": round(rate)}, **early.figures)

    report()
    for record in finished.values():
        judge_early(record)
    if missing:
        engine = live_engine(context, policy)
        engine.run(missing, on_finished=keep, on_step=count)
    seconds = time.perf_counter() - started
    rate = num_tokens / max(seconds, 1e-9)
    context.timings.append({"what": "sample", "seconds": seconds, "num_tokens": num_tokens, "tokens_per_s": rate})

    for completion_id, row in rows.items():
        record = finished[completion_id]
        ids = record["completion_ids"]
        assert isinstance(ids, list | tuple)
        row |= {
            name: record[name] for name in ("prompt_ids", "completion_ids", "engine_logprobs", "finish_reason", "seed")
        }
        routes = record.get("routes")
        row |= {"completion": policy.decode(ids), "num_tokens": len(ids)}
        row |= {"routes": None if routes is None else base64.b64decode(routes)}
    write_parts(context.out, "rollouts", [rows[completion_id] for completion_id in sorted(rows)], ROLLOUTS)


def record_of(completion: Completion) -> dict[str, Any]:
    """The completion as the journal holds it, in JSON: its routes in base64."""
    routes = completion.routes
    text = None if routes is None else base64.b64encode(routes.numpy().tobytes()).decode()
    return {**vars(completion), "routes": text}


def main() -> None:
    command_main("rollout", run)


if __name__ == "__main__":
    main()
