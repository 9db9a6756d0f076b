"""`flexsink bench engine`: its floors, its synthetic model, what it times and what it writes; no card needed."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.bench import engine, engine_report, peers, results, rollouts
from stages.bench.cases import BARS, Case, parse_cases, parse_ranks, verdict
from stages.bench.decode import Rows, open_case
from stages.bench.findings import Report
from stages.bench.floor import expected_experts, floor_tokens_per_s, step_bytes
from stages.bench.memory import Memory
from stages.config import UserError
from stages.model import lora
from stages.model.policy import Policy
from stages.model.shapes import SHAPES
from stages.model.synthetic import random_tensors, synthetic_policy
from tests.patience import PATIENCE_S

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
MODEL_20B = SHAPES["gpt-oss-20b"]
ROOT = Path(__file__).parent.parent
ABSENT = ("bitsandbytes", "docker", "prefect", "pyarrow", "peft", "rich")  # on a bare machine with a card


@pytest.fixture(scope="module")
def policy() -> Policy:
    return synthetic_policy(TINY, lora_rank=4, dtype=torch.float32, device=CPU, seed=1)


@pytest.mark.parametrize(
    ("rows", "context", "tokens_per_s"),
    [(1, 1024, 1_151), (16, 1024, 5_803), (64, 1024, 19_094), (64, 4096, 14_300), (256, 1024, 55_454)],
)
def test_the_floor_is_the_one_that_was_worked_out_for_gpt_oss_20b(rows: int, context: int, tokens_per_s: float) -> None:
    assert floor_tokens_per_s(MODEL_20B, rows, context) == pytest.approx(tokens_per_s, rel=2e-3)


def test_a_step_that_hits_every_expert_reads_every_byte_of_the_model_but_the_embedding() -> None:
    shape = dataclasses.replace(TINY, num_experts=8, vocabulary=640)
    model = synthetic_policy(shape, lora_rank=0, device=CPU).model
    embedding = model.model.embed_tokens.weight
    rotary = sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers())
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    read = step_bytes(shape, 3, 0, experts_hit=8).total
    assert read == held - rotary - embedding.nbytes + 3 * embedding[0].nbytes


def test_a_sliding_layer_reads_its_window_and_a_full_one_the_context() -> None:
    per_token = 2 * 2 * 32 * 2  # keys and values of two heads of 32 channels in 16 bit
    assert step_bytes(TINY, 1, 100).cache == 4 * 100 * per_token
    assert step_bytes(TINY, 5, 1000).cache == 5 * (2 * 1000 + 2 * 128) * per_token


def test_expected_experts_are_those_of_random_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4000, 16, 32, generator=generator).topk(4, dim=-1).indices.flatten(1)
    distinct = sum(len(row.unique()) for row in draws) / len(draws)
    assert expected_experts(MODEL_20B, 16) == pytest.approx(distinct, rel=5e-3)
    assert expected_experts(MODEL_20B, 1) == pytest.approx(4)


def test_cases_and_ranks_are_read_as_they_are_written() -> None:
    assert parse_cases("1x1024, 64x4096") == [Case(1, 1024), Case(64, 4096)]
    assert parse_ranks("none,16") == [0, 16]
    for wrong in ("", "64", "64x", "0x5", "-1x5", "1x1024,", "64X4096", "1x2x3"):
        with pytest.raises(UserError, match="no case"):
            parse_cases(wrong)
    for wrong in ("", "16,", "r=16", "-1"):
        with pytest.raises(UserError, match="no LoRA rank"):
            parse_ranks(wrong)


def test_a_bar_is_lower_by_a_fifth_with_lora() -> None:
    bar = BARS[Case(1, 1024)]
    assert [verdict(rate, bar, lora=False) for rate in (519, 520, 600, 750)] == ["missed", "must", "good", "stretch"]
    assert [verdict(rate, bar, lora=True) for rate in (415, 416, 480, 600)] == ["missed", "must", "good", "stretch"]


@torch.no_grad()
def test_the_synthetic_model_is_finite_and_uses_all_experts_of_all_layers_evenly() -> None:
    policy = synthetic_policy(TINY, lora_rank=0, device=CPU, seed=3)
    counts = []
    for layer in policy.model.model.layers:
        layer.mlp.router.register_forward_hook(lambda *a: counts.append(torch.bincount(a[2][2].flatten(), minlength=8)))
    ids = torch.randint(0, TINY.vocabulary, (1, 400), generator=torch.Generator().manual_seed(0))
    logits = policy.model(ids).logits.float()
    assert torch.isfinite(logits).all()
    assert 0.5 < logits.std() < 2  # sampling is neither greedy nor uniform
    share = torch.stack(counts) / 400  # of the tokens; 0.5 each when uniform
    assert share.shape == (4, 8)
    assert share.min() > 0.2
    assert share.max() < 0.8


@torch.no_grad()
def test_the_synthetic_model_holds_out_in_fp16() -> None:
    policy = synthetic_policy(TINY.with_layers(3), lora_rank=4, dtype=torch.float16, device=CPU)
    seen = []
    for module in policy.model.modules():
        module.register_forward_hook(lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    policy.model(torch.randint(0, TINY.vocabulary, (1, 64)))
    tensors = [value for value in seen if isinstance(value, Tensor)]
    assert len(tensors) > 40
    assert all(torch.isfinite(value).all() for value in tensors)


def test_the_same_seed_makes_the_same_model_and_another_another() -> None:
    first, again, other = (
        dict(synthetic_policy(TINY, lora_rank=2, device=CPU, seed=seed).model.state_dict()) for seed in (5, 5, 6)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    same = [name for name, value in first.items() if "rotary" not in name and torch.equal(value, other[name])]
    assert same == []


def test_experts_are_packed_and_rank_0_is_no_adapter_at_all() -> None:
    bare = synthetic_policy(TINY, lora_rank=0, device=CPU)
    tensors = bare.model.model.layers[1].mlp.experts.state_dict().values()
    packed = [tensor for tensor in tensors if not tensor.is_floating_point()]
    assert sum(tensor.nbytes for tensor in packed) == 8 * 3 * 128 * 128 * 17 // 32
    assert all(tensor.dim() == 2 for tensor in tensors if tensor.is_floating_point())  # biases [E, out]
    assert bare.parameters() == []
    assert not any(isinstance(module, lora.LoraLinear | lora.ExpertLora) for module in bare.model.modules())
    assert bare.stop_token_ids == TINY.stop_token_ids


def test_scales_are_such_as_the_fast_unpacking_asks_for() -> None:
    tensors = dict(random_tensors(TINY.config(), dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)))
    scales = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith("_scales")])
    assert (int(scales.min()), int(scales.max())) == (118, 121)
    blocks = tensors["model.layers.2.mlp.experts.down_proj_blocks"]
    assert len(blocks.unique()) == 256


@torch.no_grad()
def test_the_adapter_of_the_synthetic_model_changes_what_it_says(policy: Policy) -> None:
    ids = torch.randint(0, TINY.vocabulary, (1, 50))
    with_adapter = policy.model(ids).logits
    with policy.adapter_disabled():
        without = policy.model(ids).logits
    assert 0.05 < (with_adapter - without).std() < 1


def test_a_bare_machine_can_import_the_model_and_ask_for_help_without_torch() -> None:
    lines = [
        "import sys",
        f"for name in {ABSENT!r}: sys.modules[name] = None",
        "from flows.cli import parser",
        "for what in ('engine', 'update'):",
        "    try: parser().parse_args(['bench', what, '--help'])",
        "    except SystemExit: pass",
        "assert 'torch' not in sys.modules",
        "import stages.bench.engine, stages.bench.engine_report, stages.model.synthetic, stages.model.merge",
        "import stages.bench.update, stages.bench.update_report",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert "--replay" in done.stdout
    assert "--memory-cap" in done.stdout


class FakeCase:
    """Remembers what is asked of it."""

    capture_s, cache_bytes = 1.5, 77

    def __init__(self, rows: int) -> None:
        self.rows, self.calls = rows, []

    def run(self, steps: int) -> None:
        self.calls.append(steps)

    def rewind(self) -> None:
        self.calls.append("rewind")

    def routes(self) -> Tensor:
        return torch.tensor([[[0, 1], [1, 2]], [[5, 5], [5, 5]]])

    def close(self) -> None:
        self.calls.append("close")


def test_every_repeat_begins_at_the_context_and_the_case_is_closed(policy: Policy) -> None:
    opened: list[FakeCase] = []

    def fake_open(_: Policy, *, rows: int, context: int, room: int, seed: int) -> FakeCase:
        assert (context, room) == (30, 10)
        opened.append(FakeCase(rows))
        return opened[0]

    options = engine.Options(shape=TINY, cases=(), repeats=3, steps=10)
    row = engine.measure_case(policy, options, Case(2, 30), Memory(CPU), 4.0, open_case=fake_open)
    assert opened[0].calls == [engine.WARM_UP_STEPS, *["rewind", 10] * 3, "rewind", "close"]
    assert row["distinct_experts_of_layers"] == [3, 1]
    assert row["distinct_experts"] == 2
    assert row["ms_per_step"] == sorted(row["ms_per_step_of_repeats"])[1]
    assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms_per_step"])
    assert row["floor_share"] == pytest.approx(row["tokens_per_s"] / floor_tokens_per_s(TINY, 2, 30))
    own = floor_tokens_per_s(TINY, 2, 30, read_tb_s=4.0, experts_hit=2)
    assert row["read_floor_share"] == pytest.approx(row["tokens_per_s"] / own)


class FakeStep:
    """Logits that tell which token was fed at which position: token + 1 + position is the likeliest."""

    def __init__(self, policy: Policy, max_rows: int, max_context: int) -> None:
        self.max_context = max_context
        self.routes: list[Tensor] | None = None

    def attach(self, _memory: object) -> None:
        pass

    def detach(self) -> None:
        pass

    def embed_and_decode(
        self, rows: Tensor, tokens: Tensor, positions: Tensor, page_table: Tensor, layers: Sequence[Any]
    ) -> Tensor:
        slots = rows.long()
        if self.routes is not None:
            self.routes += [torch.full((len(rows), 4), layer) for layer in range(len(layers))]
        target = (tokens[slots] + 1 + positions[slots]) % TINY.vocabulary
        return 50.0 * torch.nn.functional.one_hot(target, TINY.vocabulary).float()

    def prefill(self, ids: Tensor, starts: Sequence[int], past: int, past_kv: None, write_kv: Any) -> Tensor:
        for layer in range(TINY.num_layers):
            values = ids.float()[:, None, None].expand(-1, TINY.num_kv_heads, TINY.head_dim)
            write_kv(layer, values, -values)
        return torch.zeros(len(starts), TINY.vocabulary)


def test_rows_decode_from_their_context_and_can_be_taken_back(policy: Policy) -> None:
    rows = Rows(policy, count=2, max_tokens=200, max_new_tokens=9, make_step=FakeStep)
    rows.fill(150)
    first = rows.state.tokens[:2].clone()
    for _ in range(2):
        rows.run(3)
        assert rows.state.positions[:2].tolist() == [153, 153]
        assert torch.equal(rows.state.tokens[:2], (first + 3 + 150 + 151 + 152) % TINY.vocabulary)
        rows.rewind()
        assert torch.equal(rows.state.tokens[:2], first)
    assert rows.routes().tolist() == [[[layer] * 4] * 2 for layer in range(TINY.num_layers)]
    assert all(0.9 < layer.keys.std() < 1.1 for layer in rows.cache.layers)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in rows.cache.layers)
    rows.close()
    assert rows.cache_bytes == held  # told after it is given back


def test_rows_take_prompts_and_forced_tokens(policy: Policy) -> None:
    rows = Rows(policy, count=2, max_tokens=300, max_new_tokens=5, make_step=FakeStep)
    prompts = [list(range(1, 131)), [7] * 10]
    rows.prefill(prompts)
    full, ring = rows.cache.layers[1], rows.cache.layers[0]
    pages = rows._page_table[0, :2].tolist()
    assert full.keys[pages[0], 0, :, 0].tolist() == list(range(1, 129))
    assert full.values[pages[1], 1, :2, 5].tolist() == [-129.0, -130.0]
    assert ring.keys[0, 0, :3, 0].tolist() == [129.0, 130.0, 3.0]
    assert rows.feed(torch.tensor([5, 9])).argmax(-1).tolist() == [5 + 1 + 130, 9 + 1 + 10]
    assert rows.feed(torch.tensor([0, 0])).argmax(-1).tolist() == [1 + 131, 1 + 11]
    rows.close()


def test_a_case_at_the_longest_context_leaves_room_for_its_steps(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy.model.config, "max_position_embeddings", 512)
    monkeypatch.setattr("stages.bench.decode.Rows", lambda *args, **kinds: Opened(kinds))
    opened: Any = open_case(policy, rows=1, context=512, room=40)
    assert (opened.kinds["max_tokens"], opened.context) == (512, 472)


class Opened:
    def __init__(self, kinds: dict[str, Any]) -> None:
        self.kinds = kinds

    def fill(self, context: int) -> None:
        self.context = context


def test_what_was_found_is_written_after_every_finding_and_an_error_costs_only_its_row(tmp_path: Path) -> None:
    path = tmp_path / "made" / "engine.json"
    about = {"gpu": "NVIDIA H200", "shape": "gpt-oss-20b", "dtype": "bf16", "cuda": "13.0"}
    head = results.head(bench="engine", command="flexsink bench engine", **about)
    head |= {"read_tb_s": 4.47123456, "reference_tb_s": 4.3}
    report = Report(head, lambda body: results.write(path, body), kinds=engine.KINDS)

    def fails() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    about = {"system": "flexsink", "batch": 256, "context": 1024, "lora": 16}
    report.attempt("rows", about, fails)
    assert json.loads(path.read_text())["rows"] == [about | {"error": "RuntimeError: out of memory"}]
    assert report.failed
    figures = engine.row_of(MODEL_20B, Case(64, 4096), 64e3 / 9_000, 31.5, 4.47)
    about = {"system": "flexsink", "batch": 64, "context": 4096, "lora": 0, "peak_bytes": 21_123_456_789}
    report.add("rows", about | figures)
    rows = iter(
        [{"system": "peer 1.0", "batch": 64, "context": 4096, "lora": 0, "tokens_per_s": 320.0, "ms_per_step": 200.0}]
    )
    engine.measure_peer("peer", rows, MODEL_20B, report)
    body = json.loads(path.read_text())
    assert {"bench", "gpu", "versions", "command", "read_tb_s", "rows"} <= body.keys()
    assert (body["bench"], body["weights"], body["read_tb_s"]) == ("engine", "synthetic", 4.4712)
    recorded = {"system", "batch", "context", "lora", "tokens_per_s", "ms_per_step", "floor_tokens_per_s"}
    recorded |= {"floor_share", "distinct_experts", "peak_bytes"}
    assert recorded <= body["rows"][1].keys()
    assert body["rows"][1]["peak_bytes"] == 21_123_456_789
    assert body["rows"][2]["floor_share"] == pytest.approx(320 / 14_300, rel=1e-3)
    lines = list(engine_report.lines_of(body))
    assert "must, under 22 GB" in next(line for line in lines if "9,000" in line)
    assert any("256 x 1024: RuntimeError: out of memory" in line for line in lines)


def test_a_missed_bar_is_called_missed() -> None:
    row = {"system": "flexsink", "batch": 1, "context": 1024, "lora": 0, "tokens_per_s": 500.0, "floor_share": 0.44}
    assert engine_report.bar_words(row, "gpt-oss-20b") == "missed"
    assert engine_report.bar_words(row, "gpt-oss-120b") == "missed"
    assert engine_report.bar_words(row | {"floor_share": 0.46}, "gpt-oss-120b") == "must"
    long = row | {"context": 131_072, "peak_bytes": 18_000_000_001}
    assert engine_report.bar_words(long, "gpt-oss-20b") == "OVER 18 GB"
    assert engine_report.bar_words(row | {"system": "peer"}, "gpt-oss-20b") == ""


def test_a_replayed_rollout_gives_every_completion_its_length(policy: Policy) -> None:
    rollout = rollouts.Rollout(prompts=3, group_size=2, prompt_tokens=(5, 9), median_tokens=6, longest=12, shortest=2)
    found = rollouts.replay(policy, memory=Memory(CPU), rollout=rollout._replace(max_slots=4), seed=2)
    lengths = rollouts.draw_lengths(rollout, seed=2)
    assert found["tokens"] == lengths.sum()
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["wall_s"])
    assert 3 * 5 <= found["prompt_tokens"] <= 3 * 9
    assert "tokens/s end to end (missed)" in engine_report.replay_words(found | {"lora": 0}, "gpt-oss-20b")


def test_lengths_follow_the_stated_distribution() -> None:
    rollout = rollouts.Rollout(prompts=4000)
    lengths = rollouts.draw_lengths(rollout, seed=0)
    assert lengths.min() >= 16
    assert lengths.max() == 2048
    assert sorted(lengths)[len(lengths) // 2] == pytest.approx(400, rel=0.02)
    assert (lengths > 1100).mean() == pytest.approx(0.10, abs=0.01)  # a normal exceeds ln(1100 / 400) / 0.8 so often


def test_prefill_counts_every_prompt_token(policy: Policy) -> None:
    found = rollouts.prefill(policy, memory=Memory(CPU), prompts=2, tokens=20, repeats=1)
    assert found["tokens_per_s"] == pytest.approx(40 / found["wall_s"])


def test_transformers_decodes_over_its_own_caches() -> None:
    shape = dataclasses.replace(TINY, num_layers=2)
    rows = list(peers.transformers_rows(shape, [Case(2, 200)], device=CPU, seconds=600))
    assert ["error" in row for row in rows] == [False] * 3, rows
    assert [row["system"].split(", ")[1:] for row in rows] == [
        ["default", "dynamic cache"],
        ["grouped_mm", "dynamic cache"],
        ["grouped_mm", "static cache"],
    ]
    assert all(row["tokens_per_s"] == pytest.approx(2e3 / row["ms_per_step"]) for row in rows)


def test_a_cache_that_was_filled_is_decoded_on_and_not_prefilled_again() -> None:
    model = peers.transformers_model(dataclasses.replace(TINY, num_layers=2), device=CPU)
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: widths.append(inputs[0].shape))
    for static in (False, True):
        peers.measured(model, Case(3, 150), static=static)
    assert set(widths) == {(3, 1)}


def test_a_peer_out_of_time_or_in_trouble_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataclasses.replace(TINY, num_layers=1)
    late = list(peers.transformers_rows(shape, [Case(1, 20)], device=CPU, seconds=0))
    assert all("were over" in row["error"] for row in late)

    def breaks(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(peers, "measured", breaks)
    broken = list(peers.transformers_rows(shape, [Case(1, 20)], device=CPU, seconds=600))
    assert [row["error"] for row in broken] == ["OutOfMemoryError: no room"] * 3


def own_peer(shape: Any, cases: Sequence[Case], *, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    yield {"system": "own"}


def test_a_peer_of_ones_own_is_named_by_module_and_function() -> None:
    assert next(peers.peer(f"{__name__}:own_peer")(TINY, [], device=CPU, seconds=1)) == {"system": "own"}
    for wrong in ("vllm", "no.such.module:measure", f"{__name__}:nothing"):
        with pytest.raises(UserError, match="no peer"):
            peers.peer(wrong)


def test_without_a_card_the_command_says_what_it_needs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(UserError, match="CUDA"):
        engine.measure(engine.Options(shape=TINY, cases=()), head={})
