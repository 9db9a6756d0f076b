"""`flexsink bench update`: its floor, its steps and iterations on the shape tiny, and what it writes."""

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flows.cli import parser
from stages.bench import (
    memory,
    results,
    update,
    update_iteration,
    update_peers,
    update_report,
    update_step,
)
from stages.bench.findings import Report
from stages.bench.memory import Memory, cap_memory
from stages.bench.update_cases import (
    SMALL_ITERATIONS,
    IterationCase,
    Layout,
    packed,
    parse_iterations,
    parse_targets,
    parse_tokens,
    sequence,
)
from stages.bench.update_command import bench_update
from stages.bench.update_floor import floor_tokens_per_s, keys_seen, step_flops
from stages.bench.update_longest import fits_memory, longest
from stages.bench.update_step import Setting, Stopwatch, Training, open_policy, random_samples
from stages.config import UpdateConfig, UserError
from stages.grpo import LossInputs, policy_loss
from stages.model.shapes import SHAPES
from stages.model.synthetic import random_tensors
from stages.trainer import Pack, Sample, deal_packs
from tests.patience import PATIENCE_S
from tests.tiny_training import CPU, EXACT, TINY, exact_training

MODEL_20B = SHAPES["gpt-oss-20b"]


@pytest.fixture
def training() -> Training:
    return exact_training()


def test_the_floor_is_the_one_that_was_worked_out_for_gpt_oss_20b() -> None:
    layout = sequence(4096)
    assert step_flops(MODEL_20B, layout).total / 4096 == pytest.approx(23.6e9, rel=2e-3)
    assert floor_tokens_per_s(MODEL_20B, layout) == pytest.approx(33_500, rel=2e-3)


def test_the_parts_of_the_floor_are_those_of_a_small_model_by_hand() -> None:
    shape = dataclasses.replace(
        SHAPES["tiny"], num_layers=3, num_experts=8, hidden=10, expert_hidden=6, num_heads=4, num_kv_heads=2,
        head_dim=5, vocabulary=100, window=3,
    )  # fmt: skip
    flops = step_flops(shape, sequence(5))
    weights = 10 * 20 + 2 * 10 * 10 + 20 * 10  # q, k and v, o
    assert flops.projections == 3 * 5 * 2 * 3 * weights  # layers, tokens, multiply and add, passes
    assert flops.router == 3 * 5 * 2 * 3 * 10 * 8
    assert flops.experts == 3 * 5 * 2 * 3 * 4 * (10 * 12 + 6 * 10)
    assert flops.head == 5 * 2 * 3 * 100 * 10
    full, sliding = 1 + 2 + 3 + 4 + 5, 1 + 2 + 3 + 3 + 3
    assert flops.attention == 4.5 * (2 * 2 * 4 * 5) * (full + 2 * sliding)
    assert floor_tokens_per_s(shape, sequence(5), tflops=1e-12 * flops.total) == pytest.approx(5)


@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
def test_keys_seen_are_those_of_a_mask_drawn_token_by_token(window: int | None) -> None:
    layout = Layout("packed", groups=2, group_size=3, prompt_tokens=5, completion_tokens=8)  # 7 computed
    tokens = [(0, position) for position in range(5)]  # 0: the prompt
    tokens += [(completion, position) for completion in (1, 2, 3) for position in range(5, 12)]
    seen = sum(
        owner in (0, own) and 0 <= position - behind < (window or 99)
        for own, position in tokens
        for owner, behind in tokens
    )
    assert keys_seen(layout, window) == 2 * seen
    assert layout.tokens == 2 * len(tokens)


def test_a_packed_layout_is_groups_of_eight_behind_their_prompts() -> None:
    assert packed(4096) == ("packed", 1, 8, 256, 512)
    assert (packed(32_768).groups, packed(131_072).groups) == (8, 30)
    assert packed(131_072).tokens == 30 * (256 + 8 * 511)  # a last token leads to nothing
    assert packed(131_072).trained_tokens == 30 * 8 * 512
    assert packed(131_072).unshared_tokens == 30 * 8 * (256 + 511)
    small = packed(100)
    assert (small.prompt_tokens, small.completion_tokens, small.tokens) == (5, 10, 77)
    assert (sequence(100).tokens, sequence(100).trained_tokens) == (100, 100)


def test_lengths_and_targets_are_read_as_they_are_written() -> None:
    assert parse_tokens("32768, 4096,4096") == [4096, 32_768]
    assert parse_tokens("none") == []
    assert parse_targets("attention, attention+experts") == ("attention", "attention+experts")
    for wrong in ("", "1", "4k", "-5", "4096,"):
        with pytest.raises(UserError, match="no number of tokens"):
            parse_tokens(wrong)
    for wrong in ("", "experts", "attention,"):
        with pytest.raises(UserError, match="no target of LoRA"):
            parse_targets(wrong)


def test_lora_on_attention_alone_leaves_the_experts_without() -> None:
    setting = dataclasses.replace(EXACT, targets="attention", lora_dtype="bf16")
    policy = open_policy(setting, device=CPU)
    names = [name for name, _ in policy.parameters()]
    assert len(names) == 2 * 4 * 2  # layers, projections, factors
    assert all("self_attn" in name for name in names)
    assert {parameter.dtype for _, parameter in policy.parameters()} == {torch.bfloat16}
    assert len(open_policy(EXACT, device=CPU).parameters()) == 2 * 6 * 2


def test_random_groups_have_no_advantage_on_the_whole() -> None:
    samples = random_samples(packed(200), vocabulary=50, seed=3)
    assert len(samples) == 8
    assert len({tuple(sample.prompt_ids) for sample in samples}) == 1
    assert len({tuple(sample.completion_ids) for sample in samples}) == 8
    assert sum(sample.advantage for sample in samples) == pytest.approx(0, abs=1e-5)
    assert max(sample.advantage for sample in samples) > 0.3
    assert all(0 <= token < 50 for sample in samples for token in sample.completion_ids)


def test_a_step_trains_on_every_token_once_and_moves_the_adapter(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, LossInputs, Any]] = []

    def noting(logprobs: torch.Tensor, inputs: Any, totals: Any, config: Any) -> Any:
        seen.append((len(logprobs), inputs, totals))
        return policy_loss(logprobs, inputs, totals, config)

    monkeypatch.setattr(update_step, "policy_loss", noting)
    layout = packed(60)
    samples = random_samples(layout, vocabulary=TINY.vocabulary, seed=0)
    before = [parameter.detach().clone() for _, parameter in training.policy.parameters()]
    watch = Stopwatch(CPU)
    training.step(deal_packs(samples, layout.tokens // 2), watch, on_policy=True)
    parts = watch.milliseconds()
    assert set(parts) == {"forward", "backward", "optimizer"}
    assert all(value > 0 for value in parts.values())
    assert sum(tokens for tokens, _, _ in seen) == layout.trained_tokens
    assert len(seen) > 1  # micro-batches
    for tokens, inputs, totals in seen:
        assert int(inputs.lengths.sum()) == tokens
        assert torch.equal(inputs.engine_logprobs, inputs.old_logprobs)
        assert (totals.num_completions, totals.num_tokens) == (8, layout.trained_tokens)
    moved = [not torch.equal(a, b) for a, (_, b) in zip(before, training.policy.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert all(parameter.grad is None for _, parameter in training.policy.parameters())


def test_a_stopwatch_leaves_out_what_is_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 1.75, 9.0, 9.125, 9.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch(CPU)
    for _ in range(2):
        watch.start()
        watch.lap("forward")
        watch.lap("backward")
    assert watch.milliseconds() == {"forward": 500 + 125, "backward": 250 + 125}
    assert watch.milliseconds() == {}


def test_the_figures_of_a_row_follow_from_its_milliseconds() -> None:
    parts = [{"forward": f, "backward": 50.0, "optimizer": 10.0} for f in (30.0, 20.0, 100.0)]
    row = update.row_of(MODEL_20B, packed(4096), parts)
    assert row["ms"] == 90
    assert row["tokens_per_s"] == pytest.approx(4344 / 0.090)
    assert row["unshared_tokens_per_s"] == pytest.approx(8 * 767 / 0.090)
    assert row["forward_backward_tokens_per_s"] == pytest.approx(4344 / 0.080)
    assert row["floor_share"] == pytest.approx(row["tokens_per_s"] / floor_tokens_per_s(MODEL_20B, packed(4096)))
    assert row["ms_of_repeats"] == [90, 80, 160]


@pytest.mark.parametrize("capacity", [70, 100, 257, 1000, 5000])
def test_the_longest_length_is_found_to_a_sixteenth(capacity: int) -> None:
    found = longest(lambda tokens: "" if tokens <= capacity else "too long", start=256, limit=1 << 20, seconds=60)
    assert found.tokens <= capacity
    assert found.tokens >= capacity * (1 - 1 / 15)
    assert found.reason.endswith("too long")
    assert len(found.tried) < 12


def test_the_search_for_the_longest_length_ends() -> None:
    assert longest(lambda tokens: "", start=64, limit=300, seconds=60)[:2] == (300, [64, 128, 256, 300])
    assert longest(lambda tokens: "no", start=64, limit=300, seconds=60).tokens == 0
    late = longest(lambda tokens: "", start=64, limit=300, seconds=-1)
    assert late[:2] == (64, [64])
    assert "were over" in late.reason


def test_only_a_lack_of_memory_counts_as_too_long() -> None:
    def fails(error: Exception) -> Any:
        def attempt() -> None:
            raise error

        return attempt

    assert fits_memory(lambda: None) == ""
    assert "OutOfMemoryError" in fits_memory(fails(torch.OutOfMemoryError("CUDA out of memory")))
    assert "cudaHostAlloc" in fits_memory(fails(RuntimeError("cudaHostAlloc: out of memory")))
    assert "cannot fit" in fits_memory(fails(UserError("the update cannot fit", "less")))
    with pytest.raises(RuntimeError, match="shapes"):
        fits_memory(fails(RuntimeError("shapes differ")))


def test_an_iteration_samples_judges_and_trains(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    case = IterationCase(2, 4, 6, 5, repeats=1)
    taken: list[Any] = []

    def noting(samples: Sequence[Sample], pack_tokens: int) -> list[Pack]:
        taken.append((samples, pack_tokens))
        return deal_packs(samples, pack_tokens)

    monkeypatch.setattr(update_iteration, "deal_packs", noting)
    row = update_iteration.measure(training, case, memory=Memory(CPU), pack_tokens=26, seed=5)
    assert len(taken) == 2
    samples, pack_tokens = taken[-1]
    assert pack_tokens == 26
    assert [len(sample.completion_ids) for sample in samples] == [5] * 8
    for group in (samples[:4], samples[4:]):
        assert len({tuple(sample.prompt_ids) for sample in group}) == 1
        rewards = [sum(token % 2 == 0 for token in sample.completion_ids) for sample in group]
        ranked = sorted(range(4), key=lambda place: rewards[place])
        assert group[ranked[0]].advantage <= group[ranked[-1]].advantage
        assert sum(sample.advantage for sample in group) == pytest.approx(0, abs=1e-5)
    assert [sample.completion_ids for sample in taken[0][0]] != [sample.completion_ids for sample in samples]
    assert row["iteration_s"] == pytest.approx(row["rollout_s"] + row["reward_s"] + row["update_s"], rel=1e-3)
    assert row["forward_s"] + row["backward_s"] + row["optimizer_s"] <= row["update_s"]
    assert row["rollout_tokens_per_s"] == pytest.approx(40 / row["rollout_s"])
    assert row["strict_s"] > 0
    assert row["warm"]
    assert row["first"]["iteration_s"] > 0


def test_the_engine_gets_what_the_cap_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    policy = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, parameters=lambda: [("a", parameter)])
    update = UpdateConfig(optimizer="adamw_8bit")
    training: Any = SimpleNamespace(policy=policy, update=update, optimizer=SimpleNamespace(state={}))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12_000_000_000)
    left = 15_000_000_000 - 12_000_000_000 - update_iteration.ENGINE_RESERVE_BYTES
    assert update_iteration.cache_budget(15_000_000_000, training) == left - 4000  # the engine's copy, the moments
    training.optimizer.state[parameter] = {"step": 1}
    assert update_iteration.cache_budget(15_000_000_000, training) == left - 2000
    assert update_iteration.cache_budget(None, training) == 0


def test_iterations_are_picked_by_name() -> None:
    assert parse_iterations("none", tiny=False) == ()
    assert parse_iterations("all", tiny=True) == SMALL_ITERATIONS
    picked = parse_iterations("1x8x4096,1x8x128", tiny=False)
    assert [(case.prompts, case.group_size, case.new_tokens) for case in picked] == [(1, 8, 4096), (1, 8, 128)]


def test_transformers_with_peft_trains_on_attention_and_on_experts() -> None:
    shape = dataclasses.replace(TINY, num_layers=1)
    rows = list(update_peers.transformers_rows(shape, [24], device=CPU, seconds=600, rank=4))
    assert ["error" in row for row in rows] == [False] * 2, rows
    assert [row["targets"] for row in rows] == ["attention", "attention+experts"]
    for row in rows:
        assert row["system"].startswith("transformers")
        assert "peft" in row["system"]
        assert row["system"].endswith(", eager")
        assert "checkpointing" in row["setting"]
        assert row["tokens_per_s"] == pytest.approx(24e3 / row["ms"])
        assert row["forward_ms"] > 0


def test_the_peers_adapter_is_on_the_targets_alone() -> None:
    shape = dataclasses.replace(TINY, num_layers=1)
    for target, stacks in (("attention", 0), ("attention+experts", 2)):
        model = update_peers.adapted(shape, target, rank=4, device=CPU)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(names) == 2 * (4 + stacks), names
        assert model.training
        assert model.is_gradient_checkpointing


def test_a_peer_out_of_memory_or_time_says_so_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataclasses.replace(TINY, num_layers=1)
    monkeypatch.setattr(update_peers, "adapted", lambda *args, **kinds: torch.nn.Linear(1, 1))

    def breaks(model: Any, length: int, **_: Any) -> dict[str, Any]:
        if length > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"tokens_per_s": 1.0}

    monkeypatch.setattr(torch.nn.Linear, "set_attn_implementation", lambda *_: None, raising=False)
    monkeypatch.setattr(torch.nn.Linear, "config", SimpleNamespace(_experts_implementation="eager"), raising=False)
    monkeypatch.setattr(update_peers, "measured", breaks)
    rows = list(update_peers.transformers_rows(shape, [50, 200], device=CPU, seconds=600, targets=["attention"]))
    assert rows[0]["tokens_per_s"] == 1.0
    assert rows[1]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert (rows[1]["tokens"], rows[1]["lora"]) == (200, 16)
    late = list(update_peers.transformers_rows(shape, [50], device=CPU, seconds=-1))
    assert all("were over" in row["error"] for row in late)


def own_peer(shape: Any, tokens: Sequence[int], **kinds: Any) -> Iterator[dict[str, Any]]:
    yield {"system": "own", "mode": "sequence", "tokens": tokens[0], "lora": kinds["rank"], "tokens_per_s": 2.0}
    raise RuntimeError("own is broken")


def test_the_command_measures_the_tiny_shape_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    path = tmp_path / "made" / "update.json"
    words = ["bench", "update", "--shape", "tiny", "--layers", "1", "--tokens", "32", "--lora", "4", "--repeats", "2"]
    words += ["--memory-cap", "24e9", "--dtype", "fp32", "--lora-dtype", "fp32", "--optimizer", "adamw", "--longest"]
    words += ["--iteration", "--agreement", "--updates", "1"]
    words += ["--peers", f"{__name__}:own_peer", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["flexsink", *words])
    args = parser().parse_args(words)
    assert bench_update(args) == 0
    body = json.loads(path.read_text())
    assert {"bench", "gpu", "versions", "command", "rows"} <= body.keys()
    assert (body["bench"], body["weights"], body["gpu"]) == ("update", "synthetic", "cpu")
    assert body["command"] == " ".join(["flexsink", *words[:-2]])  # without --out
    recorded = {"system", "mode", "tokens", "lora", "tokens_per_s", "floor_share", "peak_bytes", "cap_bytes"}
    *ours, peer, broken = body["rows"]
    assert [row["mode"] for row in ours] == ["sequence", "packed"]
    assert all(recorded <= row.keys() for row in ours)
    assert ours[0]["tokens"] == 32
    assert all(len(row["ms_of_repeats"]) == 2 for row in ours)
    floor = floor_tokens_per_s(dataclasses.replace(SHAPES["tiny"], num_layers=1), sequence(32))
    assert (peer["system"], peer["lora"], peer["floor_share"]) == ("own", 4, pytest.approx(2 / floor, rel=1e-3))
    assert broken["error"] == "RuntimeError: own is broken"
    assert [row["tokens"] for row in body["longest"]] == [128]
    assert len(body["iteration"]) == 2
    assert [row["system"] for row in body["agreement"]] == ["flexsink", "transformers"]
    assert body["agreement"][0]["difference_max"] < 1e-5
    told = capsys.readouterr().out
    assert "packed" in told
    assert "128 tokens uncapped" in told
    assert f"{__name__}:own_peer: RuntimeError: own is broken" in told
    assert f"written to  {path}" in told


def test_targets_are_measured_one_after_the_other() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    options = update.Options(setting=EXACT, targets=("attention", "attention+experts"))
    report = update.measure(options, head={})
    attention, both = report.body["startup"]
    assert (attention["targets"], both["targets"]) == options.targets
    assert attention["adapter_bytes"] == 4 * 2 * 4 * (128 + 256 + 2 * (128 + 64) + 256 + 128)  # q, k and v, o
    assert both["adapter_bytes"] - attention["adapter_bytes"] == 4 * 2 * 8 * 4 * (128 + 256 + 128 + 128)
    assert attention["weight_bytes"] == both["weight_bytes"]


def test_without_repeats_the_first_step_is_what_is_measured() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    rows = update.measure(update.Options(setting=EXACT, tokens=(16,), repeats=0), head={}).body["rows"]
    assert [len(row["ms_of_repeats"]) for row in rows] == [1, 1]
    assert all(row["ms"] <= 1e3 * row["first_s"] for row in rows)


def test_wrong_words_are_told_before_anything_is_measured() -> None:
    for words, said in (
        (["--repeats", "-1"], "--repeats is -1"),
        (["--pack-tokens", "-1"], "--pack-tokens is -1"),
        (["--memory-cap", "-1"], "--memory-cap is -1"),
        (["--tokens", "4k"], "no number of tokens"),
        (["--peers", "vllm"], "no peer"),
        (["--shape", "gpt-5"], "no shape"),
        (["--iteration", "8x8x8"], "there is no '8x8x8'"),
    ):
        with pytest.raises(UserError, match=said):
            bench_update(parser().parse_args(["bench", "update", *words]))


def test_without_a_card_a_large_shape_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    options = update.Options(setting=Setting(shape=MODEL_20B))
    with pytest.raises(UserError, match="CUDA"):
        update.measure(options, head={})


def test_a_cap_is_a_share_of_the_cards_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card, set_to = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=140e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: set_to.append(share))
    assert cap_memory(card, 35e9) == 35_000_000_000
    assert cap_memory(card, 0) is None
    assert cap_memory(card, 200e9) is None
    assert set_to == [(35e9 - memory.OVERSHOOT_BYTES) / 140e9, 1.0, 1.0]
    assert cap_memory(CPU, 35e9) is None


def test_a_watched_measurement_sees_what_was_taken_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    watching, looked = Memory(CPU), threading.Event()
    watching.device = torch.device("cuda", 0)
    use = 70

    def in_use() -> int:
        looked.set()
        return use

    monkeypatch.setattr(watching, "_in_use", in_use)
    monkeypatch.setattr(memory, "WATCH_EVERY_S", 0.001)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 20)
    with watching.watched():
        assert looked.wait(PATIENCE_S)
        use = 5
    assert watching.row() == {"peak_bytes": 70, "driver_bytes": 70}


def own_row(**figures: Any) -> dict[str, Any]:
    row = Setting(shape=MODEL_20B).about() | {"mode": "sequence", "tokens": 4096, "cap_bytes": None}
    parts = [{"forward": 80.0, "backward": 160.0, "optimizer": 10.0}]
    return row | update.row_of(MODEL_20B, sequence(4096), parts) | {"peak_bytes": 19_500_000_000} | figures


def test_rows_are_held_against_their_bars() -> None:
    assert update_report.bar_words(own_row(), "gpt-oss-20b") == "must, under 20 GB"
    slow = own_row(tokens_per_s=7_900.0, peak_bytes=20_000_000_000, cap_bytes=24_000_000_000)
    assert update_report.bar_words(slow, "gpt-oss-20b") == "missed, OVER 20 GB, BELOW 8,000 capped"
    long = own_row(tokens=131_072, peak_bytes=23_900_000_000)
    assert update_report.bar_words(long, "gpt-oss-20b") == "under 24 GB"
    large = own_row(tokens=32_768, peak_bytes=85_000_000_000)
    assert update_report.bar_words(large, "gpt-oss-120b") == "under 90 GB"
    assert update_report.bar_words(large | {"targets": "attention"}, "gpt-oss-120b") == "OVER 80 GB"
    assert update_report.bar_words(own_row(system="peer"), "gpt-oss-20b") == ""


def test_the_report_tells_rows_slopes_peers_iterations_and_agreement(tmp_path: Path) -> None:
    path = tmp_path / "update.json"
    about = {"gpu": "NVIDIA H200", "shape": "gpt-oss-20b", "dtype": "bf16", "cuda": "13.0"}
    head = results.head(bench="update", command="flexsink bench update", **about) | {"reference_tflops": 790.0}
    report = Report(head, lambda body: results.write(path, body), kinds=update.KINDS)
    report.add("rows", own_row(driver_bytes=20_100_000_000))
    report.add("rows", own_row(tokens=32_768, peak_bytes=23_800_000_000))
    report.add("rows", {**Setting(shape=MODEL_20B).about(), "mode": "packed", "tokens": 9, "error": "OutOfMemoryError"})
    peer = {"system": "transformers 5.17 + peft 0.21", "mode": "sequence", "lora": 16, "targets": "attention+experts"}
    report.add_peer("peer", [peer | {"tokens": 4096, "tokens_per_s": 1264.0}], lambda row: 33_500)
    iteration = {"prompts": 1, "group_size": 8, "prompt_tokens": 128, "new_tokens": 128, "lora": 16, "dense": "full"}
    iteration |= {"targets": "attention+experts", "iteration_s": 1.9, "rollout_s": 1.2, "reward_s": 0.01}
    iteration |= {"update_s": 0.69, "strict_s": 0.1, "rollout_tokens_per_s": 853.0, "peak_bytes": 14_000_000_000}
    report.add("iteration", iteration | {"warm": True})
    report.add("iteration", iteration | {"warm": True, "new_tokens": 1024, "peak_bytes": 15_100_000_000})
    figures = {"tokens": 640, "k3": 1e-3, "ratio_mean": 1.001, "difference_mean": 0.01, "difference_max": 0.2}
    ours = {"system": "flexsink", "mode": "engine against trainer", "sets_differ": 0.03, "replay_sets_differ": 0.0}
    report.add("agreement", ours | figures | {f"replay_{name}": value / 4 for name, value in figures.items()})
    report.add("agreement", {"system": "transformers", "mode": "eager", "sets_differ": 0.02} | figures)
    body = json.loads(path.read_text())
    assert body["rows"][0]["peak_bytes"] == 19_500_000_000
    assert "error" not in body["rows"][3]
    told = "\n".join(update_report.lines_of(body))
    assert "16,384" in told
    assert "must, under 20 GB" in told
    assert "packed of 9, LoRA r=16 a+e: OutOfMemoryError" in told
    assert "150.0 kB a token from 4096 to 32768" in told  # (23.8e9 - 19.5e9) / 28672
    assert "13.0 times the speed of transformers 5.17 + peft 0.21: 4096 tokens, LoRA r=16 a+e (bar 9: must)" in told
    assert "under 2 s" in told
    assert "OVER 15 GB" in told
    assert "sets under 5%, 1.50 times transformers' own (OVER 1.3)" in told
    assert "with the engine's routes: k3 2.50e-04" in told
    assert told.count("(held)") == 1


def test_scaled_weights_are_those_drawn_but_for_what_the_residual_stream_is_given() -> None:
    shape = SHAPES["gpt-oss-20b"].with_layers(8)
    config = shape.config()
    config.update({"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_local_experts": 4})
    drawn, scaled = (
        dict(
            random_tensors(
                config, dtype=torch.float32, generator=torch.Generator().manual_seed(0), scaled_init=scaled_init
            )
        )
        for scaled_init in (False, True)
    )
    changed = {name.split(".", 3)[-1] for name in drawn if not torch.equal(drawn[name], scaled[name])}
    assert changed == {
        "self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.experts.down_proj_scales", "mlp.experts.down_proj_bias"
    }  # fmt: skip
    name = "model.layers.3.self_attn.o_proj.weight"
    torch.testing.assert_close(scaled[name], drawn[name] / 4)
    name = "model.layers.3.mlp.experts.down_proj_scales"
    assert torch.equal(scaled[name] + 2, drawn[name])  # bytes are exponents
