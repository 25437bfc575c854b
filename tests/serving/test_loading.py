"""MLflow's own loader serves a version only if it is proven, and is the champion by the signed record."""

import base64
import io
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow import pyfunc
from PIL import Image

from tasks.tracking import write_mlmodel
from tests.trust.folders import MODEL, POLICY, TRAINED_ON, make_scores, put_scores
from tests.trust.folders import make_project as make_policy
from textcraftor import lookup, plugins, training_proof
from textcraftor.artifact import digest, proof
from textcraftor.candidate import parts_digest
from textcraftor.config import load
from textcraftor.errors import Unproven
from textcraftor.evaluate.gate import judge_candidate
from textcraftor.layout import BASE
from textcraftor.signing import Keyring
from textcraftor.trust.statement import make_statement
from textcraftor.trust.verifier import verify

PARAMS = {
    "profile": "tiny",
    "base": {"path": "base", "resolution": 32},
    "chain": {"num_inference_steps": 3},
    "train": {"grad_steps": 1},
    "train_unet": {"grad_steps": 1},
    "registry": {"name": MODEL},
}


@pytest.fixture
def version(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A candidate as MLflow downloads it, in a project with its base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEXTCRAFTOR_PROJECT", str(tmp_path))
    make_policy(tmp_path)
    shutil.copytree(base_folder, "base")
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS))
    folder = tmp_path / "downloaded"
    (folder / "text_encoder").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base_folder / "text_encoder" / name, folder / "text_encoder" / name)
    (folder / "evidence").mkdir()
    write_mlmodel(folder)
    (folder / "proof.json").write_text("{}")
    run, ring = load("params.yaml"), Keyring(tmp_path, {})
    scores = make_scores("balanced", parts_digest({"text_encoder": digest(folder / "text_encoder")}), 0.2)
    sections = {name: getattr(run, name) for name in ("base", "chain", "sampler")}
    about = proof({**sections, "diversity_judge": "layout"}, {"base": Path("base")}, 0)
    scores.proof.update(about)  # type: ignore[attr-defined]
    base = make_scores(BASE, "base", 0.0)
    base.proof.update(about)  # type: ignore[attr-defined]
    training_proof.write(folder, ["text_encoder"], TRAINED_ON, scores.proof["trained_weights"], ring)
    put_scores(scores, folder, ring)
    put_scores(base, folder, ring, base=True)
    make_statement(folder, MODEL, POLICY, judge_candidate("balanced", scores, base, POLICY), scores, ring)
    (folder / "registered_model_meta").write_text(yaml.safe_dump({"model_name": MODEL, "model_version": "1"}))
    return folder


@pytest.fixture
def champion(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signed record names the version."""
    copy = shutil.copytree(version, version.parent / "copy")
    (copy / "registered_model_meta").unlink()
    statement = verify(copy, MODEL, version.parent).digest
    monkeypatch.setattr(plugins, "plugin", lambda *_: lambda name: statement if name == MODEL else None)


def test_mlflow_loads_and_draws_the_champion(version: Path, champion: None) -> None:
    model = pyfunc.load_model(str(version))
    first, second = model.predict({"prompt": ["a red circle", "a blue square"]}, params={"seed": 5, "steps": 2})
    assert Image.open(io.BytesIO(base64.b64decode(first))).size == (32, 32) and first != second
    assert model.predict({"prompt": ["a blue square"]}, params={"seed": 6, "steps": 2}) == [second]


def test_another_proven_version_is_not_served_whatever_the_alias_says(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "plugin", lambda *_: lambda _: "0" * 64)
    with pytest.raises(Unproven, match="is not its champion by the signed record"):
        pyfunc.load_model(str(version))
    monkeypatch.setenv("TEXTCRAFTOR_SERVE", "any")
    assert pyfunc.load_model(str(version)).predict({"prompt": ["a"]}, params={"steps": 2})


@pytest.mark.parametrize(
    "part", ["text_encoder/model.safetensors", "evidence/scores.parquet", "MLmodel", "statement.dsse.json"]
)
def test_what_was_changed_is_not_served(version: Path, champion: None, part: str) -> None:
    with (version / part).open("ab") as file:
        file.write(b"\n# changed")
    with pytest.raises(Unproven):
        pyfunc.load_model(str(version))


def test_another_base_is_not_served(version: Path, champion: None) -> None:
    index = Path("base/model_index.json")
    index.write_text(index.read_text() + "\n")
    with pytest.raises(lookup.ModelError, match="judged on another base"):
        pyfunc.load_model(str(version))
