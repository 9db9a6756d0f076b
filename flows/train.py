"""The flow. `loop` is the whole algorithm's order of stages; `train` runs it, in Prefect where Prefect is installed."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

from flows import steps
from flows.progress import Lines
from stages.artifacts import RunDir, Session, StageId
from stages.config import RunConfig
from stages.tasks import early


def loop(config: RunConfig, step: Callable[[StageId], object]) -> None:
    """Calls `step` for every stage of a run, each after the stages it reads. Knows nothing of how a step is run."""
    iterations, every = config.train.iterations, config.evaluate.every
    step(StageId("load"))
    step(StageId("evaluate", 0))
    for iteration in range(iterations):
        step(StageId("rollout", iteration))
        step(StageId("score", iteration))
        step(StageId("update", iteration))
        updates = iteration + 1
        if every and updates % every == 0 and updates < iterations:
            step(StageId("evaluate", updates))
    step(StageId("evaluate", iterations))
    step(StageId("export", iterations, config.export.format))


def stages_of(config: RunConfig) -> Iterator[StageId]:
    """The stages `loop` would run, in its order."""
    order: list[StageId] = []
    loop(config, order.append)
    yield from order


def train(run: RunDir, config: RunConfig, view: Lines) -> None:
    """Runs every stage that is not done. Errors: UserError from any stage; what was finished stays finished."""
    with run.lock(), steps.logging_to(run, config.logging.level), Session() as session:
        if config != run.config():
            run.save_config(config)
        steps.reap(run)
        early.enable(session)
        if find_spec("prefect") is None:
            view.note("Prefect is not installed: the run goes on without its UI")
            loop(config, steps.local(run, config, session, view))
            return

        def body() -> None:
            loop(config, steps.prefect(run, config, session, view))

        steps.in_flow(run, config, view, body)
