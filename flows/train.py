"""The flow. `loop` is the whole algorithm's order of stages; `train` runs it, in Prefect where Prefect is installed."""

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

from flows import devices, steps
from flows.progress import Lines, View, Views
from flows.tracking import tracked
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


class Work(NamedTuple):
    """What a process has while it works on a run."""

    session: Session
    view: View
    # told of every stage: the one that a person sees, and the tracker where one is asked for


@contextlib.contextmanager
def working(
    run: RunDir, config: RunConfig, view: Lines, *, wait: Callable[[str], None] | None = None
) -> Iterator[Work]:
    """The run and its device locked for this process, the run's log open, what a killed start left removed.

    wait: told of a device that is taken, and then waited for; without it a taken device is a UserError.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.lock())
        stack.enter_context(steps.logging_to(run, config.logging))
        stack.enter_context(devices.held(run, config, wait=wait))
        views = stack.enter_context(tracked(run, config, view))
        session = stack.enter_context(Session())
        steps.reap(run)
        yield Work(session, views)


def go_on(run: RunDir, config: RunConfig, work: Work, make_step: Callable[..., steps.Step]) -> None:
    """Runs every stage of the run that is not done. make_step: steps.local or steps.prefect."""
    if config != run.config():
        run.save_config(config)
    early.enable(work.session)
    work.view.expect(list(stages_of(config)))
    loop(config, make_step(run, config, work.session, work.view))


def train(run: RunDir, config: RunConfig, view: Lines) -> None:
    """Runs every stage that is not done. Errors: UserError from any stage; what was finished stays finished."""
    with working(run, config, view) as work:
        if find_spec("prefect") is None:
            view.note("Prefect is not installed: the run goes on without its UI")
            go_on(run, config, work, steps.local)
        else:
            shown = work._replace(view=Views([work.view, steps.Artifacts(run)]))
            steps.in_flow(run, config, view, lambda: go_on(run, config, shown, steps.prefect))
