"""`textcraftor keys` and `textcraftor policy` on the command line."""

from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from textcraftor.cli import app
from textcraftor.errors import ConfigError, ModelError

ROOT = Path(__file__).parents[2]
POLICY = Path("mlflow/policy/textcraftor-tiny.yaml")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the shipped models, in the current folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tiny").symlink_to(ROOT / "data/tiny")
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TEXTCRAFTOR_SIGNING_KEY", raising=False)
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, ConfigError | ModelError):
        raise result.exception  # which `main` prints in one line
    return result


def test_the_shipped_policy_is_the_gate_of_the_shipped_profile() -> None:
    done = run("policy", "check", "--params", str(ROOT / "params.yaml"))
    assert (done.exit_code, done.output) == (0, "the same\n")


def test_a_policy_is_pinned_once_and_replaced_on_purpose_only(project: Path) -> None:
    with pytest.raises(ConfigError, match="has no policy"):
        run("policy", "check")
    assert run("policy", "pin").output == f"{POLICY}\n"
    pinned, shipped = (yaml.safe_load(path.read_text()) for path in (POLICY, ROOT / POLICY))
    assert pinned == shipped
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["gate"] = {"min_prompts": 40}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    differs = run("policy", "check")
    assert (differs.exit_code, differs.output) == (1, f"differs from {POLICY}: gate\n")
    with pytest.raises(ConfigError, match=f"{POLICY} is there already"):
        run("policy", "pin")
    run("policy", "pin", "--replace")
    assert run("policy", "check").exit_code == 0 and "min_prompts: 40" in POLICY.read_text()


def test_without_the_judges_weights_no_policy_is_written(project: Path) -> None:
    with pytest.raises(ModelError, match=r"is missing .*textcraftor fetch --profile sd15"):
        run("policy", "pin", "--profile", "sd15")
    assert not POLICY.parent.exists()


def test_keys_are_listed_rotated_and_revoked(project: Path) -> None:
    first = run("keys").output.split()[0]
    assert run("keys").output == f"{first}  believed  signs on this machine\n"
    second = run("keys", "rotate").output.split()[0]
    assert run("keys").output.splitlines() == [f"{second}  believed  signs on this machine", f"{first}  believed"]
    assert "Run the pipeline again" in run("keys", "revoke", first[:12]).output
    assert run("keys").output.splitlines() == [f"{second}  believed  signs on this machine", f"{first}  revoked"]
    with pytest.raises(ConfigError, match="is not the id of one key"):
        run("keys", "revoke", "nonsense")
