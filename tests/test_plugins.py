"""Tasks from outside the project: how they are found, what is said of broken ones, and two that are really judged."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flows.config import overridden, resolved
from flows.plan import warnings
from flows.presets import tiny_test
from stages import score
from stages.artifacts import RunDir, Session, StageId, execute, survey
from stages.artifacts.manifest import task_digest, versions
from stages.artifacts.parquet import ROLLOUTS, read_table, write_parts
from stages.config import RunConfig, SandboxConfig, TaskConfig, UserError
from stages.sandbox import Limits, Outcome, open_pool
from stages.tasks import judging, plugins, registry, tables
from tests.patience import PATIENCE_S
from tests.test_flow import run_locally
from tests.test_score import rollout_row

ROOT = Path(__file__).parents[1]
COINS = ROOT / "tests" / "examples" / "coins"
TASK = """
from stages.tasks.base import Task
class Good(Task):
    name, title, entry = "good", "a good task", "f"
    reward_names = ("works", "no_cheating", "worth")
    case_columns = {"seed": "int64"}
    def prompt(self):
        return "Write f."
    def grade(self, case):
        return 1.0
"""


def install(monkeypatch, folder, files, project, *, name="site"):
    """Puts modules on the path with the .dist-info that an installer would write for this pyproject."""
    site = folder / name
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    about = tomllib.loads(project)["project"]
    info = site / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    points = about["entry-points"]["flexsink.tasks"]
    lines = "".join(f"{point} = {value}\n" for point, value in points.items())
    (info / "entry_points.txt").write_text(f"[flexsink.tasks]\n{lines}")
    monkeypatch.syspath_prepend(str(site))
    for module in list(sys.modules):
        if module.partition(".")[0] in {Path(path).parts[0].removesuffix(".py") for path in files}:
            monkeypatch.delitem(sys.modules, module)
    return site


def project(name="my-task", version="0.3", **points):
    lines = "".join(f'{point} = "{value}"\n' for point, value in points.items())
    return f'[project]\nname = "{name}"\nversion = "{version}"\n[project.entry-points."flexsink.tasks"]\n{lines}'


@pytest.fixture
def coins(monkeypatch, tmp_path):
    """The folder examples/coins, installed."""
    files = {str(path.relative_to(COINS)): path.read_text() for path in COINS.glob("flexsink_coins/*.py")}
    install(monkeypatch, tmp_path, files, (COINS / "pyproject.toml").read_text())
    for cached in (versions, task_digest):
        cached.cache_clear()
    yield registry.get("coins")
    for cached in (versions, task_digest):
        cached.cache_clear()


def blocks():
    """The files that the README's section on one's own task shows, by the name in their first line."""
    section = (ROOT / "README.md").read_text().split("## Your own task")[1].split("\n## ")[0]
    found = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", section, re.DOTALL)
    return dict(found)


def test_a_distribution_brings_a_task_and_the_projects_own_win(monkeypatch, tmp_path):
    assert plugins.names() == []
    install(monkeypatch, tmp_path, {"mine.py": TASK}, project(good="mine:Good", game2048="mine:Good"))
    task = registry.get("good", {"cases": 3})
    assert (task.title, task.options.cases) == ("a good task", 3)
    assert registry.get("game2048").entry == "strategy"
    assert plugins.names() == ["game2048", "good"]
    with pytest.raises(UserError, match="goood") as caught:
        registry.get("goood")
    assert caught.value.hint == "did you mean task.name=good?"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import nowhere_at_all\n", "my-task 0.3 does not load: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def Good(:\n", "my-task 0.3 does not load: SyntaxError"),
        ("raise KeyError('x')\n", "my-task 0.3 does not load: KeyError: 'x'"),
        ("Bad = 1\n", "my-task 0.3 does not load: AttributeError"),
        ("Good = 1\n", "my-task 0.3 is no task: 1 is not a subclass of stages.tasks.base.Task"),
        ("class Good: pass\n", "is not a subclass of stages.tasks.base.Task"),
        (TASK.replace("    def prompt(self):\n        return", "    text ="), "it does not define prompt"),
        (TASK.replace("    case_columns", "    columns"), "it does not set case_columns"),
        (TASK.replace('"good", "a', '"bad", "a'), "its name is 'bad', its entry point's 'good'"),
        (TASK.replace('("works", "no_cheating", "worth")', '"works"'), "its reward_names are 'works'"),
        (TASK.replace(', "worth")', ")"), "it needs grade(case) and three reward_names"),
        (TASK.replace("grade", "worth"), "it needs grade(case) and three reward_names"),
        (TASK.replace('"int64"', '"long"'), "its case_columns have {'seed': 'long'}; types are bool, int32"),
        (TASK + "    options_type = dict\n", "its options_type is <class 'dict'>, not a dataclass"),
        (TASK + "    cases = 'games'\n", "its options have no games, which says on how many"),
        (
            "import dataclasses\n@dataclasses.dataclass\nclass Options:\n    cases: int = 3\n    sizes: tuple = ()\n"
            + TASK
            + "    options_type = Options\n",
            "its option sizes has no default that is a bool, a number or a word",
        ),
    ],
)
def test_a_broken_plugin_is_an_error_with_a_hint_that_names_the_distribution(monkeypatch, tmp_path, text, problem):
    install(monkeypatch, tmp_path, {"mine.py": text}, project(good="mine:Good"))
    with pytest.raises(UserError) as caught:
        registry.get("good")
    assert problem in caught.value.message
    assert "'good' of my-task 0.3" in caught.value.message
    assert caught.value.message.count("\n") == 0
    assert "mine:Good" in caught.value.hint


def test_an_edited_task_is_told_of_by_plan(coins, tmp_path):
    config = resolved(overridden(tiny_test(), ["task.name=coins"]))
    run = RunDir.create(tmp_path / "run", config)

    def load(context):
        (context.out / "model.json").write_text("{}")

    with Session() as session:
        execute(run, config, StageId("load"), load, session)
    assert warnings(survey(run, config, [StageId("load")]), "coins") == []
    before = task_digest("coins")
    harness = Path(sys.modules["flexsink_coins"].__file__).parent / "harness.py"
    harness.write_text(harness.read_text() + "\n")
    task_digest.cache_clear()
    assert task_digest("coins") != before
    (line,) = warnings(survey(run, config, [StageId("load")]), "coins")
    assert line.startswith("load was made with other code of the task coins")
    assert task_digest("game2048") == ""


def test_two_distributions_that_bring_one_name_are_refused(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, {"mine.py": TASK}, project(good="mine:Good"))
    install(monkeypatch, tmp_path, {"yours.py": TASK}, project("other", good="yours:Good"), name="second")
    with pytest.raises(UserError, match=r"my-task 0\.3 and other 0\.3"):
        registry.get("good")


def test_a_plugins_options_are_checked_like_any_other_key(coins):
    config = resolved(overridden(tiny_test(), ["task.name=coins", "task.size=5"]))
    assert config.task.option_values() == {"size": 5, "steps": 8, "cases": 8}
    for words, problem, hint in (
        (["task.sise=5"], "unknown key task.sise of coins", "task.size"),
        (["task.size=big"], "task.size is 'big'", "int"),
        (["task.size=99"], "task.size is 99", "3 to 15 cells"),
    ):
        with pytest.raises(UserError) as caught:
            resolved(overridden(tiny_test(), ["task.name=coins", *words]))
        assert problem in caught.value.message
        assert hint in caught.value.hint


def test_the_defaults_of_a_task_hold_what_they_promise(coins):
    coins.validate()
    training = [seed for group in range(20) for seed in coins.training_seeds(0, 3, group)]
    assert len(set(training)) == 160
    assert all(seed % 2 == 0 for seed in training)
    assert all(seed % 2 == 1 for seed in coins.held_out_seeds(50))
    assert coins.held_out_seeds(50)[:5] == coins.held_out_seeds(5)
    job = coins.job("x", "def strategy(b): ...", [4, 6], Limits())
    assert job.cases == ({"seed": 4, "size": 4, "steps": 8}, {"seed": 6, "size": 4, "steps": 8})
    rows = ({"seed": 4, "coins": 5, "most": 10, "moves": "WA"}, {"seed": 6, "coins": 0, "most": 10, "moves": ""})
    result = judging.Result(job_id="x", outcome=Outcome.ok, detail="", cases=rows)
    assert coins.score(result).rewards == {"works": 1.0, "no_cheating": 0.0, "coins": 2.5}
    assert coins.measure(rows) == {"mean_grade": 2.5}
    assert coins.describe(rows) == "2 cases, mean_grade 2.5"
    died = judging.Result(job_id="x", outcome=Outcome.crash, detail="", cases=rows[:1])
    assert coins.score(died).reward == 0.0
    assert coins.score(died).cases == []


def test_the_third_task_takes_a_hundred_lines():
    assert sum(len(path.read_text().splitlines()) for path in COINS.glob("flexsink_coins/*.py")) <= 100


def test_what_a_plugins_task_made_is_recorded_with_its_version(coins):
    assert versions("coins")["flexsink-coins"] == "0.1"
    assert "flexsink-coins" not in versions("game2048")


def test_a_run_whose_plugin_is_gone_says_so(tmp_path):
    run = RunDir.create(tmp_path / "run", RunConfig(task=TaskConfig(name="coins")))
    with pytest.raises(UserError, match="unknown task 'coins'"):
        registry.of(run.config())


@pytest.mark.docker
def test_the_example_is_scored_through_the_real_stage_with_its_own_columns(coins, tmp_path):
    config = RunConfig(task=TaskConfig(name="coins"), sandbox=SandboxConfig(containers=1, cpu_s=2.0))
    run = RunDir.create(tmp_path / "run", config)
    programs = [
        *coins.baselines().values(),
        "def strategy(board):\n    return None\n",
        "n = 0\ndef strategy(board):\n    global n\n    n += 1\n    return 'D' if n < 60 else 1 // 0\n",
        "import os\ndef strategy(board):\n    return 'D'\n",
        "def strategy(board):\n    for row in board:\n        row[:] = [9] * 4\n    return 'D'\n",
    ]
    rows = [
        rollout_row(0, number, f"<|channel|>final<|message|>```python\n{program}```<|return|>")
        for number, program in enumerate(programs)
    ]
    for row in rows:
        row["group_index"] = 0
    with Session() as session:
        execute(run, config, StageId("load"), lambda context: (context.out / "x").write_text("x"), session)
        write = lambda context: write_parts(context.out, "rollouts", rows, ROLLOUTS)  # noqa: E731
        execute(run, config, StageId("rollout", 0), write, session)
        manifest = execute(run, config, StageId("score", 0), score.run, session)
    assert manifest.recorded["versions"]["flexsink-coins"] == "0.1"
    table = read_table(run.folder(StageId("score", 0)), "scores", tables.scores(coins))
    right, nearest, quits, dies, foreign, writes = table.to_pylist()
    assert [row["outcome"] for row in (right, nearest, quits, dies, foreign)] == [
        "ok", "ok", "ok", "crash", "foreign_import",
    ]  # fmt: skip
    assert nearest["reward"] > right["reward"] > quits["reward"] == 1.0
    assert (dies["reward"], foreign["reward"]) == (0.0, -5.0)
    assert writes["cases"] == right["cases"]
    assert [case["moves"] for case in right["cases"]] == ["DDDDDDDD"] * 8
    # On a 4x4 board 8 steps to the right go round twice: what they collect is the first row.
    import random

    for case in right["cases"]:
        draw = random.Random(case["seed"])
        cells = [draw.choice((0, 1, 2, 5)) for _ in range(16)]
        assert case["coins"] == sum(cells[:4])
        assert case["most"] == sum(sorted(cells)[8:])
    assert (right["depends_on_board"], right["depends_on_calls"], right["state_kept"]) == (False, None, "")
    assert dies["state_kept"] == "line 4: writes global n"
    shown = flexsink(tmp_path, "inspect", str(run.path), "--completion", "00000-000-000")
    assert "00000-000-000" in shown
    assert "DDDDDDDD" in shown
    for name, answer in (("board  ", "no: "), ("calls  ", "unknown"), ("random ", "unknown"), ("time   ", "no: ")):
        assert f"depends on {name}{answer}" in shown
    shown = flexsink(tmp_path, "inspect", str(run.path), "--completion", "00000-000-003")
    assert "may keep state between calls: line 4: writes global n" in shown


def flexsink(tmp_path, *words):
    """What the command prints in a process of its own, the example installed."""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    command = [sys.executable, "-m", "flows.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.docker
@pytest.mark.slow
def test_the_example_trains_and_reports_like_any_task(coins, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["task.name=coins", "train.iterations=1", "rollout.prompts=1", "rollout.max_slots=8"]
    config = resolved(overridden(tiny_test(), words))
    run = RunDir.create(tmp_path / "run", config)
    run_locally(run, config)
    rows = read_table(run.folder(StageId("score", 0)), "scores").to_pylist()
    assert len(rows) == 8
    # The bundled model was taught nothing of coins; what it writes is scored all the same.
    assert [row["reward"] for row in rows] == [
        row["reward_works"] + row["reward_no_cheating"] + row["reward_coins"] for row in rows
    ]
    summary = read_table(run.folder(StageId("evaluate", 1)), "summary").to_pylist()
    assert [row["name"] for row in summary][1:] == ["right", "nearest"]
    assert summary[2]["mean_grade"] > summary[1]["mean_grade"]
    flexsink(tmp_path, "report", str(run.path))
    assert "collecting coins" in (run.path / "report.html").read_text()


@pytest.mark.docker
def test_the_readmes_own_task_works_as_printed(monkeypatch, tmp_path):
    files = blocks()
    assert sorted(files) == ["guess/harness.py", "guess/task.py", "pyproject.toml"]
    assert sum(len(text.splitlines()) for text in files.values()) < 60
    about = files.pop("pyproject.toml")
    install(monkeypatch, tmp_path, files, about)
    task = registry.get("guess", {"cases": 6})
    task.validate()
    harnesses = {task.name: task.harness_source()}
    halving = "def guess(low, high):\n    return (low + high) // 2\n"
    counting = "def guess(low, high):\n    return low\n"
    programs = [halving, counting, "def guess(low, high):\n    return 'x'\n", "import os\n" + halving, None]
    attempts = [judging.Attempt(str(n), program, (2, 4, 6, 8, 10, 12)) for n, program in enumerate(programs)]
    with open_pool(SandboxConfig(containers=1), harnesses=harnesses, labels={"flexsink.run": "test-readme"}) as pool:
        scores = judging.judge(attempts, task=task, pool=pool, limits=Limits(cpu_s=2))
    assert [score.outcome for score in scores] == ["ok", "ok", "crash", "foreign_import", "no_program"]
    halved, counted = scores[:2]
    import random

    secrets = [random.Random(seed).randrange(100) for seed in (2, 4, 6, 8, 10, 12)]
    assert [case["tries"] for case in counted.cases] == [secret + 1 for secret in secrets]
    assert all(case["tries"] <= 7 for case in halved.cases)
    assert halved.reward > counted.reward > scores[2].reward > scores[4].reward > scores[3].reward
    assert task.extract("```python\n" + halving + "```") == halving


def test_the_example_can_be_built_into_a_wheel_that_holds_all_of_it(tmp_path):
    folder = shutil.copytree(COINS, tmp_path / "coins")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        folder,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"flexsink_coins/task.py", "flexsink_coins/harness.py"} <= set(names)
    assert any(name.endswith("entry_points.txt") for name in names)
