"""A signed candidate verifies; every way of making another one pass is refused, with its reason.

Each attack changes a folder, the project's policy or its keys, as somebody could who reaches the registry's files or its
REST API, but not the key that signs.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tests.trust.folders import JUDGES, MODEL, POLICY, TRAINED_ON, make_candidate, make_project, make_scores, put_scores
from textcraftor import training_proof
from textcraftor.candidate import Candidate
from textcraftor.config import GateRule
from textcraftor.errors import ConfigError, Unproven
from textcraftor.evaluate.gate import judge_candidate
from textcraftor.layout import BASE
from textcraftor.signing import Keyring
from textcraftor.trust.policy import Policy, policy_file
from textcraftor.trust.statement import BASE_SCORES, SCORES, SCORES_SIGNATURE, STATEMENT, files, make_statement, weights_digest
from textcraftor.trust.verifier import verify

Attack = Callable[[Path, Keyring], object]
WEIGHTS = "text_encoder/model.safetensors"
NOT_SIGNED, NO_KEY = "its files are not the ones that were signed", "no key that is believed here signed it"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


@pytest.fixture
def folder(tmp_path: Path, project: Path) -> Path:
    return make_candidate(tmp_path / "candidate", project)


def test_what_passed_is_proven_and_its_verdict_is_computed_again(folder: Path, project: Path) -> None:
    proven = verify(folder, MODEL, project)
    assert proven.record["passed"] and proven.scores.candidate == "balanced"
    assert {rule["rule"]: rule["passed"] for rule in proven.record["rules"]} == {
        "oracle.delta": True,
        "heldout.ci_low": True,
        "diversity.ratio": True,
        "heldout.held_out": True,
    }
    assert proven.statement.predicate["policy"] == POLICY.digest
    assert proven.statement.signer == Keyring(project, {}).signer().public_key.keyid
    assert set(proven.statement.subject) >= {WEIGHTS, SCORES, BASE_SCORES, "proof.json"}


def _shards(path: object) -> Callable[[Path], object]:
    index = "text_encoder/model.safetensors.index.json"
    return lambda folder: (folder / index).write_text(json.dumps({"weight_map": {"layer": path}}))


def _exchange_scores(folder: Path) -> None:
    """Better scores, signed by the attacker's own key."""
    put_scores(make_scores("balanced", "", 0.4), folder, Keyring(folder.parent / "attacker", {}))


def _sign_again(folder: Path) -> None:
    """Other weights, and a new statement for them by the attacker's own key."""
    (folder / WEIGHTS).write_bytes(b"other weights")
    scores = make_scores("balanced", "", 0.2)
    record = judge_candidate("balanced", scores, make_scores(BASE, "base", 0.0), POLICY)
    make_statement(folder, MODEL, POLICY, record, scores, Keyring(folder.parent / "attacker", {}))


def _inner_folder(folder: Path) -> None:
    (folder / "text_encoder/inner").mkdir()
    (folder / "text_encoder/inner/config.json").write_text("{}")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "other weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"other"), NOT_SIGNED),
    "another architecture": (lambda folder: (folder / "text_encoder/config.json").write_text('{"a": 1}'), NOT_SIGNED),
    "a part more": (lambda folder: shutil.copytree(folder / "text_encoder", folder / "unet"), NOT_SIGNED),
    "a part less": (lambda folder: shutil.rmtree(folder / "text_encoder"), NOT_SIGNED),
    "weights beside the weights": (lambda folder: (folder / "text_encoder/extra.safetensors").write_bytes(b""), NOT_SIGNED),
    "another proof of training": (lambda folder: (folder / "proof.json").write_text('{"seed": 1}'), NOT_SIGNED),
    "another card": (lambda folder: (folder / "MODEL_CARD.md").write_text("wonderful"), NOT_SIGNED),
    "no scores of the base": (lambda folder: (folder / BASE_SCORES).unlink(), NOT_SIGNED),
    "better scores": (_exchange_scores, NOT_SIGNED),
    "another signature of the scores": (lambda folder: (folder / SCORES_SIGNATURE).write_text("{}"), NOT_SIGNED),
    "signed by a stranger": (_sign_again, NO_KEY),
    "no statement": (lambda folder: (folder / STATEMENT).unlink(), "it has no signed statement"),
    "an adapter": (lambda folder: (folder / "text_encoder/adapter_config.json").write_text("{}"), "does not belong"),
    "code": (lambda folder: (folder / "text_encoder/modeling.py").write_text("exit()"), "does not belong"),
    "a pickle": (lambda folder: (folder / "text_encoder/pytorch_model.bin").write_bytes(b""), "does not belong"),
    "a folder within a part": (_inner_folder, "does not belong"),
    "a link to weights": (lambda folder: (folder / "text_encoder/b.safetensors").symlink_to(folder / WEIGHTS), "is a link"),
    "a link to a folder": (lambda folder: (folder / "unet").symlink_to(folder / "text_encoder"), "is a link"),
    "an index of weights elsewhere": (_shards("/etc/hostname"), "names weights that are not beside it"),
    "an index of weights above": (_shards("../../model.safetensors"), "names weights that are not beside it"),
    "an index of weights that are not there": (_shards("gone.safetensors"), "names weights that are not beside it"),
    "an index of nothing": (_shards(1), "is no index|names weights that are not beside it"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_refused(folder: Path, project: Path, change: str) -> None:
    make, reason = CHANGES[change]
    make(folder)
    with pytest.raises(Unproven, match=reason):
        verify(folder, MODEL, project)


def test_the_note_that_mlflow_writes_into_what_it_loads_changes_nothing(folder: Path, project: Path) -> None:
    (folder / "registered_model_meta").write_text("model_name: toy-model\nmodel_version: '1'\n")
    assert verify(folder, MODEL, project).record["passed"]
    (folder / "registered_model_meta").unlink()
    (folder / "registered_model_meta").symlink_to("/etc/hostname")
    with pytest.raises(Unproven, match="is a link"):
        verify(folder, MODEL, project)


def test_another_candidates_statement_is_refused(folder: Path, project: Path, tmp_path: Path) -> None:
    other = make_candidate(tmp_path / "other", project, gain=0.3)
    shutil.copyfile(other / STATEMENT, folder / STATEMENT)
    with pytest.raises(Unproven, match=NOT_SIGNED):
        verify(folder, MODEL, project)


# Signed by our own evaluation, and still not enough: the statement of a buggy or older pipeline does not count, the tables do.
def few(prompts: int) -> pl.DataFrame:
    return make_scores("balanced", "", 0.2, prompts).table


PROOF = make_scores("balanced", "", 0.2).proof


def judged_by(**judges: str) -> dict[str, object]:
    weights = {name: {"digest": 64 * each, "largest": []} for name, each in judges.items()}
    return {"proof": {**PROOF, "judge_weights": {**JUDGES, **weights}}}


SIGNED: dict[str, tuple[dict[str, object], str]] = {
    "no gain": ({"gain": 0.01}, r"does not pass the policy of toy-model \(oracle.delta\)"),
    "a loss": ({"gain": -0.2}, r"oracle.delta, heldout.ci_low"),
    "two prompts": ({"table": few(2)}, r"oracle.delta, heldout.ci_low, diversity.ratio"),
    "a judge is missing": ({"table": few(40).drop("heldout")}, "heldout.ci_low"),
    "a score is not finite": ({"table": few(40).with_columns(oracle=pl.lit(float("nan")))}, "oracle.delta"),
    "one image a prompt": ({"table": few(40).filter(image_index=0)}, "a prompt has 1 images, the policy asks for 2"),
    "other weights than judged": ({"digest": "d" * 64}, "its weights have digest"),
    "trained on the judge": (
        {"proof": {**PROOF, "trained_weights": {"renamed": {"digest": "b" * 64, "largest": []}}}},
        "heldout.held_out",
    ),
    "training not recorded": (
        {"proof": {key: PROOF[key] for key in ("config", "judge_weights")}},
        "heldout.held_out",
    ),
    "a judge with other weights": (judged_by(heldout="e"), "the judge heldout has other weights"),
    "a judge of unknown weights": ({"proof": {**PROOF, "judge_weights": {}}}, r"other weights \(unknown\)"),
    "diversity by other weights": (judged_by(layout="e"), "diversity was measured with other weights"),
    "diversity by another judge": (
        {"proof": {**PROOF, "config": {"diversity_judge": "heldout"}}},
        "diversity was measured with other weights",
    ),
    "diversity by nobody knows what": ({"proof": {**PROOF, "config": {}}}, r"diversity was measured with .* \(unknown\)"),
    "a prompt under a false id": (
        {"table": few(40).with_columns(prompt_id=pl.col("prompt_id").str.replace("^....", "0000"))},
        "an id that is not its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SIGNED)
def test_a_signature_does_not_replace_the_verdict(tmp_path: Path, project: Path, case: str) -> None:
    changes, reason = SIGNED[case]
    folder = make_candidate(tmp_path / "candidate", project, **changes)  # type: ignore[arg-type]
    with pytest.raises(Unproven, match=reason):
        verify(folder, MODEL, project)


def _train(prompts: list[str], weights: dict[str, object] | None = None) -> Attack:
    """Another training of the same weights: on other prompts, or by other rewards."""
    return lambda folder, ring: training_proof.write(
        folder, ["text_encoder"], prompts, PROOF["trained_weights"] if weights is None else weights, ring
    )


def _start_from(folder: Path, ring: Keyring) -> None:
    earlier = training_proof.Trained(training_proof.prompt_numbers(["prompt 3"]), {})
    training_proof.write(folder, ["text_encoder"], TRAINED_ON, PROOF["trained_weights"], ring, [earlier])


def _by_a_stranger(folder: Path, ring: Keyring) -> None:
    training_proof.write(folder, ["text_encoder"], [], PROOF["trained_weights"], Keyring(folder.parent / "stranger", {}))


def _another_list(folder: Path, ring: Keyring) -> None:
    """The training was on a prompt that is judged on; the list beside its statement is another's."""
    _train(["another prompt"])(folder, ring)
    short = (folder / training_proof.PROMPTS).read_bytes()
    _train(["prompt 3"])(folder, ring)
    (folder / training_proof.PROMPTS).write_bytes(short)


def _add_a_unet(folder: Path, ring: Keyring) -> None:
    (folder / "unet").mkdir()
    (folder / "unet/config.json").write_text("{}")


def _blend(folder: Path, ring: Keyring) -> None:
    """The training that is signed is no part's."""
    (folder / "parts/red").mkdir(parents=True)
    (folder / "text_encoder").rename(folder / "parts/red/text_encoder")
    (folder / "blend.json").write_text("{}")


TRAININGS: dict[str, tuple[Attack, str]] = {
    "judged on a prompt of its training": (_train(["prompt 3", "prompt 4"]), "2 of the prompts .* such as 'prompt 3'"),
    "the same in other letters": (_train(["  PROMPT\t3"]), "1 of the prompts"),
    "it started from one that was trained on it": (_start_from, "1 of the prompts"),
    "a short list of the prompts": (_another_list, "was signed for other files: trained-on.parquet"),
    "no list of the prompts": (lambda folder, _: (folder / training_proof.PROMPTS).unlink(), "training is not signed"),
    "nobody signed the training": (lambda folder, _: (folder / training_proof.STATEMENT).unlink(), "training is not signed"),
    "a stranger signed the training": (_by_a_stranger, f"the training: {NO_KEY}"),
    "another proof than the training wrote": (
        lambda folder, _: (folder / "proof.json").write_text('{"seed": 1}'),
        "was signed for other files: proof.json",
    ),
    "other weights than the training wrote": (
        lambda folder, _: (folder / WEIGHTS).write_bytes(b"other"),
        f"was signed for other files: {WEIGHTS}",
    ),
    "weights that the training did not write": (
        lambda folder, _: (folder / "text_encoder/b.safetensors").write_bytes(b"other"),
        "was signed for other files: text_encoder/b.safetensors",
    ),
    "a reward that the scores hide": (_train([], {"heldout": JUDGES["heldout"]}), "trained on heldout, and its scores"),
    "a reward with other weights than the scores say": (_train([], {"clip": JUDGES["heldout"]}), "trained on clip, and its"),
    "a UNet that nobody trained": (_add_a_unet, "the training of its unet is not signed"),
    "a blend of what nobody trained": (_blend, "the training of parts/red is not signed"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAININGS)
def test_what_was_trained_on_is_signed_by_the_training(tmp_path: Path, project: Path, case: str) -> None:
    attack, reason = TRAININGS[case]
    folder = make_candidate(tmp_path / "candidate", project, attack=attack)
    with pytest.raises(Unproven, match=reason):
        verify(folder, MODEL, project)


def test_the_policy_that_is_pinned_now_judges(folder: Path, project: Path) -> None:
    verify(folder, MODEL, project)
    weaker = POLICY.model_copy(update={"gate": POLICY.gate.model_copy(update={"min_prompts": 2})})
    stricter = POLICY.gate.model_copy(update={"rules": (GateRule(judge="oracle", metric="delta", at_least=0.3),)})
    POLICY.model_copy(update={"gate": stricter}).write(MODEL, "toy", project)
    with pytest.raises(Unproven, match=r"oracle.delta"):
        verify(folder, MODEL, project)
    weaker.write(MODEL, "toy", project)
    assert verify(folder, MODEL, project).statement.predicate["policy"] == POLICY.digest  # under which it was signed


def test_a_weaker_policy_at_signing_helps_nobody(tmp_path: Path, project: Path) -> None:
    weak = POLICY.gate.model_copy(update={"rules": (GateRule(judge="oracle", metric="delta", at_least=-1.0),)})
    folder = make_candidate(tmp_path / "weak", project, gain=0.01, policy=POLICY.model_copy(update={"gate": weak}))
    with pytest.raises(Unproven, match="does not pass the policy"):
        verify(folder, MODEL, project)


def test_without_a_policy_nothing_is_proven(folder: Path, project: Path) -> None:
    with pytest.raises(Unproven, match="it was judged for 'toy-model', not for 'another'"):
        verify(folder, "another", project)
    (project / policy_file(MODEL)).unlink()
    with pytest.raises(ConfigError, match=r"toy-model has no policy \(mlflow/policy/toy-model.yaml\).*textcraftor policy pin"):
        verify(folder, MODEL, project)


def test_a_policy_that_leaves_the_judge_of_diversity_open_is_none(folder: Path, project: Path) -> None:
    POLICY.model_copy(update={"diversity_judge": ""}).write(MODEL, "toy", project)
    with pytest.raises(ConfigError, match=r"diversity_judge does not name the weights.*policy pin --replace"):
        verify(folder, MODEL, project)


@pytest.mark.parametrize("text", ["", "rules: []", "gate: {", "[1]", "\x00"])
def test_a_damaged_policy_proves_nothing(folder: Path, project: Path, text: str) -> None:
    (project / policy_file(MODEL)).write_text(text)
    with pytest.raises(ConfigError, match=r"toy-model\.yaml is not a policy"):
        verify(folder, MODEL, project)


@pytest.mark.parametrize("name", ["", ".", "..", "../params", "a/b", "a\\b"])
def test_a_policys_name_stays_in_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a file's name"):
        Policy.load(name, Path())


def test_a_revoked_key_proves_nothing(folder: Path, project: Path) -> None:
    ring = Keyring(project, {})
    ring.rotate()
    verify(folder, MODEL, project)
    (retired,) = set(ring.believed()) - {ring.signer().public_key.keyid}
    ring.revoke(retired)
    with pytest.raises(Unproven, match=NO_KEY):
        verify(folder, MODEL, project)


def test_the_digest_of_the_weights_is_the_one_that_evaluation_names(folder: Path) -> None:
    assert weights_digest(files(folder)) == Candidate.find(str(folder), Path()).digest
