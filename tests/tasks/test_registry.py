"""Candidates become versions once; only proven versions are promoted and fetched."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import yaml
from mlflow import MlflowClient
from prefect.states import Failed

from tasks import stage_times
from tasks import store as registry_store
from tasks.gate import Verdict, read_verdict
from tasks.registry import challenge, promote, register, version_page
from tasks.store import RegistryUnavailable
from tasks.tracking import only_if_unavailable, open_history, track
from tasks.versions import fetch
from tasks.workspace import Workspace
from tests.tasks.registered import MODEL, alias_holder, enter
from textcraftor.artifact import code_revision, digest, write_json
from textcraftor.candidate import Candidate
from textcraftor.errors import ModelError, Unproven
from textcraftor.evaluate.scores import Scores
from textcraftor.evaluate.signed_scores import write_signed
from textcraftor.layout import GATE_RECORD, blend_folder, encoder_folder, report_folder, scores_file


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, judged: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(registry_store, "STORE", tmp_path / "store")
    monkeypatch.setattr(registry_store, "ROOT", judged[1].parent)
    return registry_store.client()


@pytest.fixture
def workspaces(judged: dict[int, Path], tmp_path: Path) -> dict[int, Workspace]:
    """Copies, so that a test may tamper with them."""
    return {
        steps: Workspace(Path(shutil.copytree(folder, tmp_path / f"steps-{steps}", symlinks=True)))
        for steps, folder in judged.items()
    }


def test_the_same_candidate_is_one_run_and_one_version(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    assert [enter(workspaces[200]), enter(workspaces[200])] == [1, 1]
    assert enter(workspaces[300]) == 2
    assert len(store.search_model_versions(f"name = '{MODEL}'")) == 2
    experiment = store.get_experiment_by_name(MODEL)
    runs = store.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    data = next(run.data for run in runs if run.data.params["train.steps"] == "200")
    assert data.metrics["judges/oracle/delta"] == pytest.approx(0.208)
    assert data.metrics["train/loss"] == 0.5
    assert data.tags["gate"] == "passed"


def test_a_run_says_what_was_made_when_from_what(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    workspace = workspaces[200]
    for stage, times in {"train@balanced": (1000.0, 1060.5), "evaluate@balanced": (1061.0, 1070.0)}.items():
        stage_times.write(workspace.folder, stage, *times)
    enter(workspace)
    (version,) = store.search_model_versions("tags.validation_status = 'passed'")
    run = store.get_run(version.run_id)
    assert (run.info.start_time, run.info.end_time) == (1_000_000, 1_070_000)
    assert run.data.params["chain.num_inference_steps"] == str(workspace.config.chain.num_inference_steps)
    assert run.data.tags["mlflow.source.name"] == "textcraftor train --mix balanced"
    scores = Scores.read(workspace.folder / scores_file("balanced"))
    assert run.data.tags["mlflow.source.git.commit"] == code_revision()
    trained, judged = run.inputs.dataset_inputs
    file = workspace.folder / encoder_folder("balanced") / "trained-on.parquet"
    assert (trained.dataset.name, trained.dataset.digest) == ("train prompts", digest(file)[:36])
    assert (judged.dataset.name, judged.dataset.profile) == ("heldout prompts", '{"prompts": 32}')
    (output,) = run.outputs.model_outputs
    model = store.get_logged_model(output.model_id)
    assert (model.name, str(model.status), model.tags["digest"]) == ("balanced", "READY", scores.digest)
    figures = {metric.key: metric for metric in model.metrics}
    assert figures["judges/oracle/delta"].dataset_digest == judged.dataset.digest
    assert figures["judges/oracle/delta"].run_id == version.run_id


def test_a_blend_is_registered_and_proven_like_a_mix(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    folder = workspaces[200].folder
    params = yaml.safe_load((folder / "params.yaml").read_text())
    blend = {"blends": ["soft"], "blend": {"soft": {"weights": {"original": 0.5, "balanced": 0.5}}}}
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, **blend}))
    saved = folder / blend_folder("soft")
    shutil.copytree(folder / encoder_folder("balanced"), saved / "parts/balanced")
    parts = {"balanced": {"digest": Candidate.find("balanced", folder).digest}}
    write_json(saved / "blend.json", {"space": "embeddings", "weights": ["original=0.5", "balanced=0.5"], "parts": parts})
    shutil.copytree(folder / report_folder("balanced"), folder / report_folder("blend-soft"))
    candidate = Candidate.find("blend-soft", folder)
    write_signed(
        replace(Scores.read(folder / scores_file("balanced")), candidate="blend-soft", digest=candidate.digest), folder
    )
    workspace = Workspace(folder)
    record = {**read_verdict.fn(workspace).records["balanced"], "digest": candidate.digest}
    run = track.fn("blend-soft", record, workspace).run_id
    version = register.fn("blend-soft", run, record, workspace)
    assert "blend of text encoders, `balanced=0.5 original=0.5`" in store.get_model_version(MODEL, str(version)).description
    fetched = fetch(str(version), workspace.config)
    assert Candidate.at(fetched).digest == candidate.digest and Candidate.at(fetched).blend
    assert promote.fn(version, workspace.config).verdict == "promoted"


def test_a_failed_candidate_is_logged_but_not_registered(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    verdict = read_verdict.fn(workspaces[1])
    assert verdict.winner is None
    assert verdict.failed_rules() == ["balanced: oracle.delta = 0.009, at least 0.050"]
    run = track.fn("balanced", verdict.records["balanced"], workspaces[1]).run_id
    assert store.get_run(run).data.tags["gate"] == "failed"
    with pytest.raises(Unproven, match="did not pass"):
        register.fn("balanced", run, verdict.records["balanced"], workspaces[1])


def test_weights_changed_after_the_gate_are_refused(workspaces: dict[int, Workspace]) -> None:
    (workspaces[200].folder / "data/encoders/balanced/text_encoder/model.safetensors").write_text("others")
    with pytest.raises(Unproven, match="balanced: its weights have digest"):
        read_verdict.fn(workspaces[200])


def test_promotion_compares_with_the_champion_and_a_person_may_overrule_it(
    store: MlflowClient, workspaces: dict[int, Workspace]
) -> None:
    config = workspaces[200].config
    worse, better = enter(workspaces[200]), enter(workspaces[300])
    assert challenge.fn(better, config).verdict == "challenger"
    assert alias_holder(store, "challenger") == str(better)
    assert promote.fn(better, config).verdict == "promoted"
    assert (alias_holder(store, "champion"), alias_holder(store, "challenger")) == (str(better), None)
    assert challenge.fn(better, config).verdict == "champion stays"
    refused = promote.fn(worse, config)
    assert (refused.verdict, alias_holder(store, "champion")) == ("not promoted", str(better))
    assert "champion.oracle" in refused.why
    by_hand = promote.fn(worse, config, by="somebody", why="the better one is too slow")
    assert (by_hand.verdict, alias_holder(store, "champion")) == ("promoted", str(worse))
    assert "a person chose it (the better one is too slow)" in by_hand.why
    recorded = json.loads(store.get_model_version(MODEL, str(worse)).tags["against_champion"])
    assert {rule["rule"]: rule["passed"] for rule in recorded} == {
        "champion.oracle.ci_low": False,
        "champion.heldout.ci_low": False,
    }


def test_fetch_returns_the_weights_that_were_judged(workspaces: dict[int, Workspace], store: MlflowClient) -> None:
    config = workspaces[200].config
    promote.fn(enter(workspaces[200]), config)
    folder = fetch("champion", config)
    assert folder == fetch("1", config)
    trained = workspaces[200].folder / "data/encoders/balanced/text_encoder/model.safetensors"
    assert (folder / "text_encoder/model.safetensors").read_bytes() == trained.read_bytes()
    assert "gate: passed" in (folder / "MODEL_CARD.md").read_text()


def test_without_a_version_the_way_to_one_is_named(workspaces: dict[int, Workspace], store: MlflowClient) -> None:
    with pytest.raises(ModelError, match=r"no version in the registry yet\. `make full` makes one"):
        fetch("champion", workspaces[200].config)


def test_an_unknown_version_lists_what_there_is(workspaces: dict[int, Workspace], store: MlflowClient) -> None:
    enter(workspaces[200])
    for asked, answer in [
        ("champion", r"no champion in the registry\. `make promote VERSION=N` makes one of its versions champion: 1;"),
        ("challenger", r"no challenger in the registry\. Name one of its versions: 1"),
        ("7", r"no version 7 in the registry\. Known: 1"),
    ]:
        with pytest.raises(ModelError, match=answer):
            fetch(asked, workspaces[200].config)


@pytest.mark.parametrize("part", ["text_encoder/model.safetensors", "evidence/gate.json", "evidence/scores.parquet"])
def test_a_version_changed_in_the_store_is_neither_promoted_nor_fetched(
    part: str, store: MlflowClient, workspaces: dict[int, Workspace], tmp_path: Path
) -> None:
    """Somebody edits the files in MLflow's artifact store."""
    config = workspaces[200].config
    version = enter(workspaces[200])
    other = fetch(str(enter(workspaces[300])), config)
    shutil.rmtree(tmp_path / "models")
    (stored,) = (tmp_path / "store/artifacts").glob(f"{store.get_model_version(MODEL, '1').run_id}/artifacts/candidate")
    if part == "evidence/gate.json":
        record = json.loads((stored / part).read_text())
        (stored / part).write_text(json.dumps({**record, "digest": "0" * 64}))
    else:
        shutil.copyfile(_part_of(workspaces[300], part), stored / part)
    store.set_registered_model_alias(MODEL, "champion", str(version))
    for attempt in (lambda: promote.fn(version, config, by="somebody"), lambda: fetch("champion", config)):
        with pytest.raises(Unproven):
            attempt()
    assert other.name.startswith("2-")


def _part_of(workspace: Workspace, part: str) -> Path:
    if part == "evidence/scores.parquet":
        return workspace.scores("balanced")
    return workspace.folder / "data/encoders/balanced" / part


def test_a_version_registered_by_hand_is_not_promoted(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    config = workspaces[200].config
    store.create_registered_model(MODEL)
    foreign = store.create_model_version(MODEL, source=str(workspaces[1].folder))
    store.set_registered_model_alias(MODEL, "champion", foreign.version)
    with pytest.raises(Unproven, match="the pipeline did not register it"):
        fetch("champion", config)
    with pytest.raises(Unproven, match="the pipeline did not register it"):
        promote.fn(int(foreign.version), config, by="somebody")
    refused = promote.fn(enter(workspaces[200]), config)
    assert refused.verdict == "not promoted" and "make promote VERSION=N" in refused.why
    assert promote.fn(2, config, by="somebody").verdict == "promoted" and alias_holder(store, "champion") == "2"


def test_a_run_that_failed_while_logging_is_logged_again(
    store: MlflowClient, workspaces: dict[int, Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read_verdict.fn(workspaces[200]).records["balanced"]
    with monkeypatch.context() as broken, pytest.raises(ConnectionError):
        broken.setattr(MlflowClient, "log_artifacts", lambda *_: (_ for _ in ()).throw(ConnectionError()))
        track.fn("balanced", record, workspaces[200])
    run = track.fn("balanced", record, workspaces[200]).run_id
    assert store.get_run(run).info.status == "FINISHED"
    assert (fetch(str(register.fn("balanced", run, record, workspaces[200])), workspaces[200].config)).is_dir()


def test_verdict_without_a_winner_says_why() -> None:
    rule = {"rule": "heldout.ci_low", "value": None, "bound": 0.0, "passed": False, "why": "no scores"}
    assert Verdict(None, {"a": {"rules": [rule]}}).failed_rules() == ["a: heldout.ci_low = nothing, at least 0.000"]


def _evaluate_again(workspace: Workspace, **changes: object) -> None:
    """Sign other scores of the candidate."""
    write_signed(replace(Scores.read(workspace.scores("balanced")), **changes), workspace.folder)  # type: ignore[arg-type]


def _rewrite_rule(workspace: Workspace, **changes: object) -> None:
    path = workspace.folder / GATE_RECORD
    gate = json.loads(path.read_text())
    gate["candidates"]["balanced"]["rules"][0].update(changes)
    path.write_text(json.dumps(gate))


def test_wording_and_code_revision_make_no_new_version(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    workspace = workspaces[200]
    assert enter(workspace) == 1
    proof = Scores.read(workspace.scores("balanced")).proof
    _evaluate_again(workspace, proof={**proof, "code_revision": "another", "versions": {"torch": "9"}})
    _rewrite_rule(workspace, why="in other words")
    assert enter(workspace) == 1
    assert "in other words" not in (fetch("1", workspace.config) / "evidence/gate.json").read_text()  # as it was registered


@pytest.mark.parametrize("change", ["bound", "a score"])
def test_another_verdict_or_score_makes_a_new_version(
    store: MlflowClient, workspaces: dict[int, Workspace], change: str
) -> None:
    workspace = workspaces[200]
    assert enter(workspace) == 1
    if change == "bound":
        _rewrite_rule(workspace, bound=0.06)
    else:
        table = Scores.read(workspace.scores("balanced")).table
        _evaluate_again(workspace, table=table.with_columns(pl.col("oracle") + 1e-9))
    assert enter(workspace) == 2


def test_a_version_from_before_statements_were_signed_is_registered_again(
    store: MlflowClient, workspaces: dict[int, Workspace]
) -> None:
    workspace = workspaces[200]
    enter(workspace)
    store.delete_model_version_tag(MODEL, "1", "statement")
    with pytest.raises(Unproven, match="before statements were signed"):
        fetch("1", workspace.config)
    assert enter(workspace) == 2
    assert fetch("2", workspace.config).is_dir()


@pytest.mark.parametrize("lost", ["evidence/gate.json", "evidence/scores.parquet", "text_encoder/model.safetensors", "."])
def test_a_run_whose_artifacts_are_gone_is_logged_again(
    store: MlflowClient, workspaces: dict[int, Workspace], lost: str
) -> None:
    workspace = workspaces[200]
    enter(workspace)
    source = store.get_model_version(MODEL, "1").source
    assert source
    path = Path(source.removeprefix("file://")) / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert enter(workspace) == 2
    assert promote.fn(2, workspace.config).verdict == "promoted"


def test_a_deleted_experiment_is_restored(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    enter(workspaces[200])
    experiment = store.get_experiment_by_name(MODEL)
    assert experiment
    store.delete_experiment(experiment.experiment_id)
    assert enter(workspaces[300]) == 2


def test_the_experiment_is_made_or_restored_before_the_work(
    store: MlflowClient, workspaces: dict[int, Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = workspaces[200].config
    made = open_history.fn(config)
    assert open_history.fn(config) == made
    store.delete_experiment(made)
    assert open_history.fn(config) == made
    assert store.get_experiment(made).lifecycle_stage == "active"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryUnavailable, match=r"MLflow at http://127\.0\.0\.1:9 cannot take this run") as raised:
        open_history.fn(config)
    assert "secret" not in str(raised.value) and only_if_unavailable(None, None, Failed(data=raised.value))


def test_no_password_in_messages_and_links(workspaces: dict[int, Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert version_page("model", 1) == "http://127.0.0.1:9/#/models/model/versions/1?workflowType=machine_learning"
    with pytest.raises(RegistryUnavailable, match=r"MLflow at http://127\.0\.0\.1:9 now") as raised:
        fetch("champion", workspaces[200].config)
    assert "secret" not in str(raised.value)


def test_a_card_says_first_what_it_gains_and_loses_and_shows_a_picture(
    store: MlflowClient, workspaces: dict[int, Workspace]
) -> None:
    version = store.get_model_version(MODEL, str(enter(workspaces[200])))
    card, run = str(version.description), str(version.run_id)
    assert card.splitlines()[2].startswith("**Its pictures show 71% of what the prompts say, the base's 51%.** Worse than the")
    assert version.tags["worse"] == "Worse than the base: shape -5.0 points." and version.tags["worse"] in card
    assert f"](/get-artifact?path=candidate%2Fevidence%2Fgrid.png&run_uuid={run})" in card
    assert f"/runs/{run}/artifacts/candidate/evidence/report.html" in card
    assert "colour  " in card and "+20.0 points" in card
    assert not re.search(r"\d\.\d{4}", card), "no more digits than mean something"
    prose = re.sub(r"```.*?```", "", card, flags=re.S)
    assert not re.search(r"\S\n\S", prose), "MLflow's page breaks a paragraph where its source does"
    kept = Path(store.download_artifacts(run, "candidate/MODEL_CARD.md")).read_text(encoding="utf-8")
    assert "](evidence/grid.png)" in kept and "](evidence/report.html)" in kept
    assert store.get_run(run).data.tags["mlflow.note.content"] == card


def test_before_anyone_decides_a_challenger_is_compared_with_the_champion(
    store: MlflowClient, workspaces: dict[int, Workspace]
) -> None:
    config = workspaces[200].config
    assert promote.fn(enter(workspaces[300]), config).worse == "Worse than the base: shape -7.5 points."
    decision = challenge.fn(enter(workspaces[200]), config)
    assert decision.verdict == "challenger" and decision.worse
    assert "Against the champion, version 1: oracle may be worse (interval from -0." in decision.why
    for _ in range(2):  # a later comparison takes the place of the earlier one
        challenge.fn(2, config)
        card = str(store.get_model_version(MODEL, "2").description)
        assert card.count("**Against the champion, version 1.**") == 1
        assert "champion.oracle.ci_low" in card and "NOT PASSED" in card
    assert card.startswith("# textcraftor-tiny: balanced")


def test_an_alias_from_before_promotions_were_signed_is_compared_with_and_signed_by_a_person(
    store: MlflowClient, workspaces: dict[int, Workspace]
) -> None:
    config = workspaces[200].config
    better, worse = enter(workspaces[300]), enter(workspaces[200])
    store.set_registered_model_alias(MODEL, "champion", str(better))
    with pytest.raises(Unproven, match=r"no signed promotion made it champion\. `make promote VERSION=1` does"):
        fetch("champion", config)
    assert promote.fn(worse, config).verdict == "not promoted"
    assert challenge.fn(better, config).verdict == "challenger"
    assert promote.fn(better, config).verdict == "promoted" and fetch("champion", config) == fetch("1", config)


def test_an_alias_that_is_moved_by_hand_has_no_effect_and_is_put_back(
    store: MlflowClient, workspaces: dict[int, Workspace]
) -> None:
    config = workspaces[200].config
    champion, other = enter(workspaces[300]), enter(workspaces[200])
    promote.fn(champion, config)
    for move in (
        lambda: store.set_registered_model_alias(MODEL, "champion", str(other)),
        lambda: store.delete_registered_model_alias(MODEL, "champion"),
    ):
        move()
        assert fetch("champion", config) == fetch(str(champion), config)
        assert challenge.fn(other, config).verdict == "challenger"
        assert alias_holder(store, "champion") == str(champion)
