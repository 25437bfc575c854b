"""The whole story, from prompts to a champion."""

from pathlib import Path

from prefect import flow
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed, State

from flows.settings import RunSettings
from tasks.gate import Verdict, read_verdict
from tasks.pages import show_candidate, show_decision
from tasks.registry import Decision, challenge, promote, register
from tasks.stages import Outcome, none_left_behind, repro
from tasks.tracking import track
from tasks.workspace import Workspace, open_workspace


@flow(name="textcraftor", persist_result=True, result_serializer="json")
def full(settings: RunSettings = RunSettings()) -> State[Decision]:  # noqa: B008 (frozen: nobody can change the default)
    """Curate, tune, judge; promote only what wins.

    A gate that nobody passes is a completed run that promotes nothing; the state's name is the verdict.
    """
    with none_left_behind():
        workspace = open_workspace(Path.cwd(), **settings.model_dump(exclude={"promote"}))
        # The first is frozen and never runs here; named, so that `dvc.lock` is whole and `dvc repro` has nothing to add.
        for stage in ("tiny", "curate", "validate", "prepare"):
            repro(stage, workspace.folder)
        tune_and_evaluate(workspace)
        repro("gate", workspace.folder)
    verdict = read_verdict(workspace)
    decision = decide(verdict, workspace, settings).model_copy(update={"folder": str(workspace.folder)})
    show_decision(decision, verdict, workspace)
    return Completed(name=decision.verdict.capitalize(), message=decision.why, data=decision)


def tune_and_evaluate(workspace: Workspace) -> None:
    """Draw and judge the base while every mix is trained, then judged, all side by side.

    One mix that fails does not stop the others: what they reach is kept, and the next run starts there.
    """
    config = workspace.config
    stages: list[PrefectFuture[Outcome]] = []

    def begin(stage: str, *after: PrefectFuture[Outcome]) -> PrefectFuture[Outcome]:
        stages.append(repro.submit(stage, workspace.folder, side_by_side=len(config.mixes) + 1, wait_for=after))
        return stages[-1]

    base = begin("evaluate-base")
    for mix in config.mixes:
        encoder = begin(f"train@{mix}")
        begin(f"evaluate@{mix}", encoder, base)
        if mix in config.unet_mixes:
            unet = begin(f"train-unet@{mix}", encoder)
            begin(f"evaluate-unet@{mix}", unet, base)
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
    passed = {name: record for name, record in verdict.records.items() if record["passed"]}
    versions = {name: register(name, runs[name], record, workspace) for name, record in passed.items()}
    decision = challenge(versions[verdict.winner], workspace.config)
    if settings.promote == "manual" or decision.verdict == "champion stays":
        return decision
    return promote(versions[verdict.winner], workspace.config)
