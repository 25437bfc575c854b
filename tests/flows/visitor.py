"""A newcomer who follows the README: a fresh clone of the project, a fresh shell in it, and the README's own commands."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.flows.project import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = Path(sys.executable).parents[1]
GIT = ("git", "-c", "user.name=visitor", "-c", "user.email=visitor@localhost", "-c", "commit.gpgsign=false")
# What a login gives, and what the set-up of the real environment needs to reach its package registry and cache. TMPDIR is not
# among them: it is set to a folder that is gone.
LOGIN = ("HOME", "LANG", "USER", "UV_CACHE_DIR", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_INDEX_URL", "SSL_CERT_FILE")


def commands() -> list[str]:
    """What the README tells its reader to type, in its order: the lines after a `$`, and commands in the running text."""
    programs = "make|prefect|dvc|git|textcraftor"
    found = re.findall(rf"^\$ (.*)$|`((?:{programs}) [^`]+)`", README, re.M)
    return [_without_comment(line or " ".join(inline.split())) for line, inline in found]


def command(start: str) -> str:
    """The only command of the README that begins like this, word for word."""
    (found,) = {each for each in commands() if each.startswith(start)}
    return found


def block(first: str) -> list[str]:
    """The commands of the only block of the README that begins with this one."""
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.S | re.M)
    typed = [[_without_comment(line) for line in re.findall(r"^\$ (.*)$", text, re.M)] for text in blocks]
    (found,) = [lines for lines in typed if lines and lines[0] == first]
    return found


def _without_comment(line: str) -> str:
    return re.sub(r"\s+#.*", "", line).strip()


@dataclass(frozen=True)
class Shell:
    """A shell that was just opened in a folder: it knows nothing of the environment that runs the tests.

    variables: what its user has set.
    """

    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        system = os.pathsep.join(part for part in os.defpath.split(os.pathsep) if part)
        fixed = {"PATH": f"{system}:/usr/local/bin", "TMPDIR": "/nonexistent", **self.variables}
        return {**fixed, **{name: os.environ[name] for name in LOGIN if name in os.environ}}

    def arguments(self, lines: list[str]) -> list[str]:
        return [shutil.which("bash") or "bash", "--noprofile", "--norc", "-ec", "\n".join(lines)]

    def run(self, *lines: str) -> "subprocess.CompletedProcess[str]":
        """Type lines, the next one when the one before it succeeded."""
        return subprocess.run(
            self.arguments(list(lines)),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )


def clone(folder: Path) -> Path:
    """A clone of this project as it lies here, with changes that are not committed yet; without Git, a copy."""
    try:
        changed = _git("diff", "--name-only", "-z", "HEAD") + _git("ls-files", "-z", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):  # a ZIP
        left_out = shutil.ignore_patterns(".venv", ".textcraftor", "runs", "*cache*", "resolved.json", "*.egg-info")
        shutil.copytree(ROOT, folder, ignore=left_out)
        return folder
    subprocess.run((*GIT, "clone", "--quiet", "--depth=1", ROOT.as_uri(), str(folder)), check=True)
    for name in filter(None, changed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    return folder


def _git(*arguments: str) -> str:
    """What Git prints about this project. Raises CalledProcessError where Git does not track it."""
    tracked = ("ls-files", "--error-unmatch", "dvc.yaml")
    run = [
        subprocess.run(("git", *each), cwd=ROOT, capture_output=True, text=True, check=True) for each in (tracked, arguments)
    ]
    return run[-1].stdout


def link_environment(folder: Path) -> None:
    """What `make setup` makes, without installing anything: an environment of `folder` that finds the packages of ours."""
    made = folder / ".venv"
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", str(made)), check=True)
    (packages,) = made.glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text(f"{folder}\n{next(ENVIRONMENT.glob('lib/python*/site-packages'))}\n")
    for name in ("textcraftor", "prefect", "dvc", "mlflow"):
        script = (ENVIRONMENT / "bin" / name).read_text().replace(str(ENVIRONMENT), str(made))
        (made / "bin" / name).write_text(script)
        (made / "bin" / name).chmod(0o755)
    (made / ".complete").touch()
