"""The flow `textcraftor`: from prompts to a champion."""

import os
from pathlib import Path

from prefect import State, flow
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed

from flows.errors import log_user_errors_in_one_line
from flows.review import ask_for_review
from flows.settings import RunSettings
from tasks.decision import Decision
from tasks.gate import Verdict, read_verdict
from tasks.gpus import GpuPool, visible_gpus
from tasks.pages import show_candidate, show_decision
from tasks.registry import challenge, decline, promote, register
from tasks.stages import Outcome, repro, stop_stages_on_error
from tasks.tracking import open_history, track
from tasks.variants import open_workspace
from tasks.workspace import Workspace


@flow(name="textcraftor", persist_result=True, result_serializer="json")
def full(settings: RunSettings = RunSettings()) -> State[Decision]:  # noqa: B008 (immutable)
    """Curate, tune, judge; promote only what wins.

    A gate that no candidate passes is a completed run that promotes nothing. The state's message is the verdict; its name
    stays Prefect's own, because the page of a deployment lists no run in a state of another name.
    """
    log_user_errors_in_one_line()
    with stop_stages_on_error():
        workspace = open_workspace(Path.cwd(), **settings.model_dump(exclude={"promote"}))
        open_history(workspace.config)
        # `tiny` is frozen and never runs here; it is listed so that dvc.lock is complete.
        for stage in ("tiny", "resolve", "curate", "validate", "prepare"):
            repro(stage, workspace.folder)
        tune_and_evaluate(workspace, GpuPool(visible_gpus(os.environ)))
        repro("gate", workspace.folder)
    verdict = read_verdict(workspace)
    decision = decide(verdict, workspace, settings).model_copy(update={"folder": str(workspace.folder)})
    show_decision(decision, verdict, workspace)
    return Completed(message=f"{decision.verdict}: {decision.why}", data=decision)


def tune_and_evaluate(workspace: Workspace, gpus: GpuPool) -> None:
    """Evaluate the base, and train and evaluate every mix: as many stages at a time as there are GPUs.

    Without GPUs all of them share the CPU. A mix that fails does not stop the others; the next run resumes from what
    they reached.
    """
    config = workspace.config
    concurrency = gpus.concurrency(len(config.all_mixes) + 1)
    stages: list[PrefectFuture[Outcome]] = []

    def submit(stage: str, *after: PrefectFuture[Outcome]) -> PrefectFuture[Outcome]:
        started = repro.submit(stage, workspace.folder, concurrency=concurrency, gpus=gpus, wait_for=after, return_state=False)
        stages.append(started)
        return started

    base = submit("evaluate-base")
    encoders: dict[str, PrefectFuture[Outcome]] = {}
    for mix in config.all_mixes:
        start = config.curriculum.get(mix)
        encoder = encoders[mix] = submit(f"train-after@{mix}", encoders[start]) if start else submit(f"train@{mix}")
        submit(f"evaluate-after@{mix}" if start else f"evaluate@{mix}", encoder, base)
        if mix in config.unet_mixes:
            unet = submit(f"train-unet@{mix}", encoder)
            submit(f"evaluate-unet@{mix}", unet, base)
    for name in config.blends:
        blend = submit(f"blend@{name}", *encoders.values())
        submit(f"evaluate-blend@{name}", blend, base)
    wait(stages)
    for stage in stages:
        stage.result()


def decide(verdict: Verdict, workspace: Workspace, settings: RunSettings) -> Decision:
    """Log every candidate, register those that passed, and let the winner challenge the champion."""
    runs = {name: track(name, record, workspace) for name, record in verdict.records.items()}
    for name in verdict.records:
        show_candidate(name, workspace)
    if verdict.winner is None:
        return Decision(verdict="not promoted", why=f"no candidate passed the gate. {'; '.join(verdict.failed_rules())}")
    if settings.promote == "never":
        return Decision(verdict="judged", candidate=verdict.winner, why=f"{verdict.winner} won; nothing was to be promoted")
    if refused := runs[verdict.winner].refused:
        why = f"{verdict.winner} passed this run's gate, and cannot become a version: {refused}"
        return Decision(verdict="not promoted", candidate=verdict.winner, why=why)
    certified = [name for name, run in runs.items() if not run.refused]
    versions = {name: register(name, runs[name].run_id, verdict.records[name], workspace) for name in certified}
    decision = challenge(versions[verdict.winner], workspace.config)
    if settings.promote == "manual" or decision.verdict == "champion stays":
        return decision
    if settings.promote == "review":
        review = ask_for_review(decision)
        conclude = promote if review.approve else decline
        return conclude(versions[verdict.winner], workspace.config, review.reviewer, review.reason)
    return promote(versions[verdict.winner], workspace.config)
