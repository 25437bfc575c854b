"""`make setup` on machines with other Pythons, shells and shims, in a folder that was moved, and without Git.

`uv` is a stand-in that notes its arguments and links the environment that runs these tests, so nothing is downloaded.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VENV = Path(sys.executable).parents[1]
TOOLS = (
    "cat",
    "chmod",
    "cksum",
    "dirname",
    "echo",
    "env",
    "git",
    "grep",
    "ln",
    "mkdir",
    "rm",
    "sh",
    "sleep",
    "tail",
    "test",
    "touch",
    "tr",
    "uname",
)
MAKE = shutil.which("make") or "make"
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="makes a repository, and there is no git on PATH")

# A Python of VERSION, as far as `python -c` can see; `python -m venv .textcraftor/uv` puts the stand-in for uv there.
PYTHON = """#!/bin/sh
case "$1" in
  -V) echo "Python VERSION"; exit ;;
  -m) echo "NAME $*" >> "$LOG"; mkdir -p .textcraftor/uv/bin
      cp "$FAKE_UV" .textcraftor/uv/bin/uv; cp "$FAKE_UV" .textcraftor/uv/bin/pip; exit ;;
  -c) shift ;;
esac
exec REAL -c "import sys; sys.version_info = (COMMAS, 0, 'final', 0); sys.implementation.name = 'KIND'; exec(sys.argv[1])" "$@"
"""
UV = f"""#!/bin/sh
echo "uv $*" >> "$LOG"
[ "$1" = python ] && exit 2
[ "$1" = venv ] || exit 0
for made; do :; done  # the last argument
mkdir -p "$made"; ln -s {VENV}/bin {VENV}/lib "$made"; cat {VENV}/pyvenv.cfg > "$made/pyvenv.cfg"
"""
BROKEN = "#!/bin/sh\necho 'pyenv: {name}: command not found' >&2\nexit 127\n"
READS_INPUT = "#!/bin/sh\nread answer\nexit 9\n"


class Machine:
    """A copy of what `make setup` reads, and a PATH with chosen programs."""

    def __init__(self, folder: Path, name: str = "project", **programs: str) -> None:
        self.project, self.bin, self.log = folder / name, folder / "bin", folder / "log"
        (self.project / ".dvc").mkdir(parents=True)
        for each in (
            "Makefile",
            "requirements.lock",
            "pyproject.toml",
            "dvc.yaml",
            "params.yaml",
            ".dvc/config",
            ".dvc/.gitignore",
        ):
            shutil.copyfile(ROOT / each, self.project / each)
        self.no_scm = self.project / ".dvc/config.local"  # there already, so that the slow `dvc config` is not needed
        self.no_scm.write_text("[core]\n    no_scm = true\n")
        (self.project / "textcraftor").mkdir()
        (self.project / "textcraftor/__init__.py").touch()
        self.bin.mkdir()
        for tool in (*TOOLS, "cp", "head"):
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        (folder / "uv").write_text(UV)
        (folder / "uv").chmod(0o755)
        for program, kind in {"uv": "uv", **programs}.items():
            self.install(program, kind)

    def install(self, name: str, kind: str) -> None:
        """kind: a version ("3.12", "pypy 3.11"), "broken" or "reads input"; for uv, "uv" or "absent"."""
        implementation, version = ("pypy", kind[5:]) if kind.startswith("pypy") else ("cpython", kind)
        python = PYTHON.replace("VERSION", version).replace("COMMAS", version.replace(".", ", ")).replace("NAME", name)
        python = python.replace("KIND", implementation).replace("REAL", sys.executable)
        program = {"broken": BROKEN.format(name=name), "reads input": READS_INPUT, "uv": UV}.get(kind, python)
        if kind != "absent":
            (self.bin / name).write_text(program)
            (self.bin / name).chmod(0o755)

    def make(self, *arguments: str, shell: str = "/bin/sh", home: Path | None = None) -> "subprocess.CompletedProcess[str]":
        environment = {
            "PATH": str(self.bin),
            "HOME": str(home or self.log.parent),
            "LOG": str(self.log),
            "FAKE_UV": str(self.log.with_name("uv")),
        }
        command = [MAKE, "--no-print-directory", f"SHELL={shell}", *(arguments or ("setup",))]
        return subprocess.run(command, cwd=self.project, env=environment, capture_output=True, text=True, timeout=60)

    @property
    def calls(self) -> list[str]:
        """What was asked of uv, and of a Python's venv."""
        return [line for line in self.log.read_text().splitlines() if "--version" not in line and "python find" not in line]


@pytest.mark.parametrize(
    ("programs", "chosen"),
    [
        ({"python3.12": "3.12", "python3": "3.9"}, "python3.12"),
        ({"python3.11": "3.11"}, "python3.11"),
        ({"python3.11": "3.11", "python3.12": "3.12", "python3": "3.13"}, "python3.11"),
        ({"python3.11": "broken", "python3.12": "3.12"}, "python3.12"),
        ({"python3.11": "broken", "python3.12": "broken", "python3": "3.12"}, "python3"),
        ({"python3.11": "reads input", "python3": "3.11"}, "python3"),
        ({"python3.11": "3.13", "python3.12": "3.12"}, "python3.12"),
        ({"python3.11": "pypy 3.11", "python3.12": "3.12"}, "python3.12"),
        ({"python": "3.11"}, "python"),
        ({"python3": "3.13", "python": "3.12"}, "python"),
    ],
)
def test_a_supported_python_that_runs_is_found(programs: dict[str, str], chosen: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, **programs)
    done = machine.make()
    assert done.returncode == 0, done.stderr
    assert f"uv venv --quiet --python {chosen} .venv" in machine.calls


@pytest.mark.parametrize(
    ("programs", "arguments", "named"),
    [
        ({"python3": "3.13", "python3.13": "3.13"}, (), "none on PATH is not one (python3 is Python 3.13)"),
        ({"python3": "3.10"}, (), "(python3 is Python 3.10)"),
        ({"python3": "broken"}, (), "(python3 is missing)"),
        ({}, (), "(python3 is missing)"),
        ({"python3.12": "3.12", "python3.13": "3.13"}, ("PYTHON=python3.13",), "python3.13 is not one"),
        ({"python3.12": "3.12"}, ("PYTHON=/nowhere/python3.12",), "/nowhere/python3.12 is not one"),
    ],
)
def test_without_one_it_says_so_in_one_line_before_anything_is_downloaded(
    programs: dict[str, str], arguments: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, **programs)
    done = machine.make(*arguments, "setup")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Python 3.11 or 3.12 is needed" in done.stderr and named in done.stderr
    assert not machine.calls and not (machine.project / ".venv").exists()


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/dash", "/bin/bash", "/bin/ksh", "/usr/bin/zsh", "/bin/busybox"])
def test_any_shell_will_do(shell: str, tmp_path: Path) -> None:
    if not Path(shell).exists():
        pytest.skip(f"there is no {shell} here")
    machine = Machine(tmp_path, **{"python3.11": "broken", "python3.12": "3.12"})
    if shell.endswith("busybox"):
        (tmp_path / "sh").symlink_to(shell)
        shell = str(tmp_path / "sh")
    assert machine.make(shell=shell).returncode == 0
    assert "uv venv --quiet --python python3.12 .venv" in machine.calls


@pytest.mark.parametrize("uv", ["absent", "broken"])
def test_without_a_uv_that_runs_one_is_installed_beside_the_project(uv: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, **{"uv": uv, "python3.12": "3.12"})
    done = machine.make()
    assert done.returncode == 0, done.stderr
    assert machine.calls[0] == "python3.12 -m venv .textcraftor/uv"
    assert "uv venv --quiet --python python3.12 .venv" in machine.calls


@pytest.mark.parametrize("uv", ["uv", "absent"])
def test_a_python_in_a_folder_with_a_space_can_be_named(uv: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, **{"uv": uv, "python3.12": "3.12"})
    folder = tmp_path / "my pythons"
    folder.mkdir()
    (machine.bin / "python3.12").rename(folder / "python3.12")
    assert machine.make(f"PYTHON={folder}/python3.12", "setup").returncode == 0


@pytest.mark.parametrize(("project", "home"), [("100%2F", "me"), ("100% mine", "my home"), ("100%", "it's")])
def test_no_package_lies_below_a_folder_with_a_percent_sign(project: str, home: str, tmp_path: Path) -> None:
    """MLflow's server ends there: `invalid interpolation syntax`. The toy stages' walk takes its packages from elsewhere."""
    machine = Machine(tmp_path, project, **{"python3.12": "3.12"})
    for _ in range(2):
        done = machine.make(home=tmp_path / home)
        assert done.returncode == 0, done.stderr
        assert (machine.project / ".venv").resolve().is_relative_to(tmp_path / home)
        venv = machine.project / ".venv"
        assert "%" not in str(venv.resolve()) and (venv / "bin/python").exists() and (venv / ".complete").exists()
        assert f"uv pip sync --quiet --compile-bytecode --python {venv.resolve()}/bin/python" in "\n".join(machine.calls)


@pytest.mark.parametrize(
    ("home", "arguments", "place"),
    [
        ("100%", (), "{tmp}/100%/.cache/textcraftor/"),
        ("me", ("TEXTCRAFTOR_VENV=.venv",), "{tmp}/a%b/.venv"),
        ("me", ("TEXTCRAFTOR_VENV={tmp}/50%/venv",), "{tmp}/50%/venv"),
    ],
)
def test_where_they_would_it_names_the_setting_before_anything_is_downloaded(
    home: str, arguments: tuple[str, ...], place: str, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, "a%b", **{"python3.12": "3.12"})
    done = machine.make(*(each.format(tmp=tmp_path) for each in arguments), "setup", home=tmp_path / home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert place.format(tmp=tmp_path) in done.stderr and "export TEXTCRAFTOR_VENV=" in done.stderr
    assert not machine.calls and not (machine.project / ".venv").exists()
    named = tmp_path / "my environment"
    assert machine.make(f"TEXTCRAFTOR_VENV={named}", "setup", home=tmp_path / home).returncode == 0
    assert (machine.project / ".venv").resolve() == named


def test_a_folder_named_as_the_environment_by_mistake_keeps_its_files(tmp_path: Path) -> None:
    machine = Machine(tmp_path, **{"python3.12": "3.12"})
    mine = tmp_path / "mine/thesis.txt"
    mine.parent.mkdir()
    mine.write_text("three years")
    machine.make(f"TEXTCRAFTOR_VENV={mine.parent}", "setup")
    assert mine.read_text() == "three years"


def test_packages_are_fetched_as_the_machine_trusts_servers(tmp_path: Path) -> None:
    if not Path("/etc/ssl/certs/ca-certificates.crt").exists():
        pytest.skip("this machine has no /etc/ssl/certs/ca-certificates.crt")
    machine = Machine(tmp_path, **{"python3.12": "3.12"})
    done = machine.make("-p", "-n", "setup")
    assert "UV_SYSTEM_CERTS = true" in done.stdout


def test_make_runs_no_command_without_a_shell() -> None:
    """make before 4.3 starts a `$(shell command -v X)`, which has nothing for a shell in it, as a program `command`."""
    makefile = (ROOT / "Makefile").read_text()
    calls = makefile.split("$(shell ")[1:]
    assert calls
    for call in calls:
        assert not call.startswith(("command ", "type ", "hash ")) and ">/dev/null" in call.replace("2>/dev/null", ">/dev/null")


def test_a_project_that_was_moved_is_set_up_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, **{"python3.12": "3.12"})
    machine.make()
    before = len(machine.calls)
    machine.make()
    assert len(machine.calls) > before, "the environment belongs to another folder"


@pytest.mark.parametrize(
    "git",
    [
        "no Git",
        *(pytest.param(each, marks=needs_git) for each in ("no program git", "another project's")),
        pytest.param("another project's that ignores it", marks=needs_git),
    ],
)
def test_dvc_runs_where_git_does_not_track_the_project(git: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, **{"python3.12": "3.12"})
    machine.no_scm.unlink()
    if git == "no program git":
        subprocess.run(["git", "init", "-q"], cwd=machine.project, check=True)
        (machine.bin / "git").unlink()
    elif git != "no Git":
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        (tmp_path / ".gitignore").write_text("project/\n" if "ignores" in git else "")
    assert machine.make().returncode == 0
    assert "no_scm = true" in machine.no_scm.read_text()
    if "ignores" not in git:  # the hardest case: DVC refuses files that Git ignores
        return
    (machine.project / "dvc.yaml").write_text("stages: {one: {cmd: echo done > out, outs: [out]}}\n")
    (machine.project / "params.yaml").unlink()
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=machine.project, capture_output=True, text=True)
    assert (done.returncode, (machine.project / "out").read_text()) == (0, "done\n"), done.stderr


@needs_git
def test_where_git_tracks_the_project_dvc_is_told_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, **{"python3.12": "3.12"})
    machine.no_scm.unlink()
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=machine.project, check=True)
    assert machine.make().returncode == 0
    assert not machine.no_scm.exists()
