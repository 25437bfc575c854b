"""The README, followed from a fresh clone in a fresh shell: its own commands, promotion and the pages of both UIs included.

The stages are toys, so that it takes a minute. With the real ones, and a real set-up:

    make test ARGS="tests/flows/test_readme.py" TEXTCRAFTOR_README=small    few prompts and steps; ten minutes of a processor
    make test ARGS="tests/flows/test_readme.py" TEXTCRAFTOR_README=full     as shipped; hours
"""

import contextlib
import json
import os
import re
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from tasks import guard
from tests.flows.project import stages_run, use_toys
from tests.flows.visit import Served, Visit, corrections, move_alias, stop, wait_for_correction
from tests.flows.visitor import GIT, Shell, block, clone, command, commands, link_environment
from tests.machines.browser import Page, needs_browser
from textcraftor.config import load
from textcraftor.trust.policy import Policy

STAGES = os.environ.get("TEXTCRAFTOR_README", "toy")
pytestmark = pytest.mark.timeout(0 if STAGES != "toy" else 600)  # real stages take as long as they take
assert STAGES in ("toy", "small", "full"), f"TEXTCRAFTOR_README={STAGES} is not toy, small or full"
needs_models = pytest.mark.skipif(
    STAGES == "toy", reason="draws and trains: TEXTCRAFTOR_README=small follows it with real stages"
)

SMALL = {
    "mixes": ["balanced"],
    "prompts": {"sources": [{"kind": "scenes", "count": 300, "rich_fraction": 0.5}], "heldout": 4, "max_train": 8},
    "chain": {"num_inference_steps": 3},
    "train": {"steps": 2, "num_inference_steps": 2, "batch_size": 1},
    "evaluate": {"prompts": 4, "images_per_prompt": 2, "baseline_prompts": 2},
    "gate": {"min_prompts": 2, "rules": [{"judge": "oracle", "metric": "delta", "at_least": -1, "why": "a trial"}]},
}

ODD = "Größe 100%2F #1 what?"  # where people keep their projects; they reach it by a link

# What a test cannot do, and why. All else that the README tells its reader to type of other programs than ours is typed below.
SET_ASIDE = {
    **dict.fromkeys(
        (
            "dvc remote add --default store /mnt/share/textcraftor",
            "dvc push",
            "dvc pull",
            "dvc get REPOSITORY data/encoders/balanced",
        ),
        "tests/test_dvc.py shares a folder by a remote",
    ),
    "make test": "these are the tests",
    'make test ARGS="-k gate"': "these are the tests",
    command("make test ARGS=tests/flows"): "this walk",
    "make check": "CI runs it",
    "make lock": "pins new versions",
    "dvc repro ablations/dvc.yaml": "an hour of trainings; tests/ablation runs a small table",
    "make full PROMOTE=review": "waits for a person; test_full.py fills in the form",
    "make full SERVERS=mine": "test_full.py has a server of its own",
    "make full": "followed as `make full PROMOTE=manual`, and again with the real stages",
}
BY_HAND = block("source .venv/bin/activate")
WITHOUT_MODELS = ("source", "dvc repro", "textcraftor config", "textcraftor resolve")
SECOND_SHELL = block("source .textcraftor/env")
FOLLOWED = [
    command("make full PROMOTE=manual"),
    command("make ui"),
    *SECOND_SHELL,
    command("prefect deployment run promote/champion"),
    command("prefect deployment run watch/champion"),
    command("make promote"),
    *BY_HAND,
    command("make full PROMPTS="),
    command("prefect deployment run textcraftor/full --watch --param settings"),
    command("textcraftor doctor"),
    command("dvc exp run"),
    command("git checkout"),
    command("dvc exp show"),
]


def test_every_command_of_the_readme_is_followed_or_set_aside_for_a_reason() -> None:
    assert not set(FOLLOWED) & set(SET_ASIDE)
    known, written = set(FOLLOWED) | set(SET_ASIDE), set(commands())
    assert known <= written
    # tests/test_readme.py parses the library's verbs, and the tests of each run it.
    assert {each for each in written - known if not each.startswith("textcraftor ")} == set()


class TheirServer(socketserver.TCPServer):
    """Somebody else's Prefect server, of which nothing but its address is of interest: it notes who calls, and hangs up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.callers: list[object] = []

    def verify_request(self, request: object, client_address: object) -> bool:
        self.callers.append(client_address)
        return False


@pytest.fixture(scope="module")
def their_server() -> Iterator[TheirServer]:
    with TheirServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory, their_server: TheirServer) -> Visit:
    home = tmp_path_factory.mktemp("readme")
    folder, theirs = home / "textcraftor", home / "theirs.db"
    (home / ODD).mkdir()
    folder.symlink_to(clone(home / ODD / ODD), target_is_directory=True)
    if STAGES == "toy":
        use_toys(folder, mixes=["balanced"])
        link_environment(folder)
    elif STAGES == "small":
        params = yaml.safe_load((folder / "params.yaml").read_text()) | SMALL
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        config = load(folder / "params.yaml")
        Policy.of(config, folder).write(config.registry.name, config.profile, folder)  # its gate is weaker than the shipped one
    if (folder / ".git").exists():
        subprocess.run((*GIT, "-C", str(folder), "commit", "-qam", "what this visitor changed"), check=STAGES != "full")
    name_their_server(folder, their_server, theirs)
    # To count GPUs takes seconds; the packages of the toys lie in the environment that runs the tests.
    shell = Shell(folder, {"CUDA_VISIBLE_DEVICES": "", "TEXTCRAFTOR_VENV": ".venv"} if STAGES == "toy" else {})
    done = shell.run(command("make full PROMOTE=manual"))
    assert done.returncode == 0, done.stdout + done.stderr
    return Visit(shell, done.stdout, theirs, their_server.callers)


def name_their_server(folder: Path, server: TheirServer, theirs: Path) -> None:
    address, database = f"http://127.0.0.1:{server.server_address[1]}/api", f"sqlite+aiosqlite:///{theirs}"
    (folder / ".env").write_text(
        f"PREFECT_API_URL={address}\nPREFECT_API_KEY=secret\nPREFECT_SERVER_API_AUTH_STRING=a:b\n"
        f"PREFECT_SERVER_DATABASE_CONNECTION_URL={database}\n"
    )
    (folder / "prefect.toml").write_text(f'[api]\nurl = "{address}"\n[server.database]\nconnection_url = "{database}"\n')


@pytest.fixture(scope="module")
def served(visit: Visit) -> Iterator[Served]:
    shell = visit.shell
    ui = guard.start(
        shell.arguments(["echo $$", f"exec {command('make ui')}"]),  # the guard makes this shell the leader of its group
        grace=60,
        cwd=shell.folder,
        env=shell.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert ui.stdout
        group, printed = int(ui.stdout.readline()), ""
        while "Ctrl-C" not in printed:
            line = ui.stdout.readline()
            assert line, f"make ui ended: {printed}"
            printed += line
        addresses = re.findall(r"http://\S+", printed)
        assert len(addresses) == 3 and f"first: {SECOND_SHELL[0]}" in printed
        yield Served(*addresses, ui, group)
        stop(ui, group)
    finally:
        guard.end(ui)
    assert not (shell.folder / ".textcraftor/env").exists()


def test_make_full_says_a_line_a_stage_then_figures_verdict_and_what_to_do_next(visit: Visit) -> None:
    lines = visit.said.splitlines()
    stages = [
        "tiny",
        "resolve",
        "curate",
        "validate",
        "prepare",
        "evaluate-base",
        "train@balanced",
        "evaluate@balanced",
        "gate",
    ]
    for stage in stages:
        assert len([line for line in lines if re.match(rf"{re.escape(stage)} +(ran|unchanged) +\d", line)]) == 1, visit.said
    for part in ("base against tuned", "claims of the prompts that hold", "Verdict: challenger (balanced, version 1"):
        assert part in visit.said
    assert any(line.strip().startswith(command("make promote")) for line in lines), "it says how to promote"
    (log,) = re.findall(r"^Log +(\S+)$", visit.said, re.M)
    assert "Finished in state Completed" in (visit.folder / log).read_text()
    assert visit.said.count("\n") < 150


@needs_browser
def test_the_pages_show_the_run_its_figures_and_the_version(served: Served, tmp_path: Path) -> None:
    runs = served.ask("/flow_runs/filter")
    (run,) = [each for each in runs if each["name"].startswith("make-full-")]
    page = Page(f"{served.prefect}/deployments/deployment/{run['deployment_id']}", tmp_path / "profile", width=1600)
    with contextlib.closing(page):
        page.wait_for("textcraftor", run["name"], "Completed")
        page.open(f"{served.prefect}/runs/flow-run/{run['id']}")
        page.wait_for(run["name"], "Completed")
        page.click("Artifacts")
        page.wait_for("verdict", "grid-balanced", "scores-balanced", "claims-balanced", "model-version", "Worse than the base")
        page.open(served.runs)
        page.wait_for("textcraftor-tiny", "balanced")
        page.open(served.model)
        page.wait_for("textcraftor-tiny", "Version 1")
        page.open(served.model.replace("?", "/versions/1?"))
        card = page.wait_for("Its pictures show", "Worse than the base", "What the gate asked for", "Limits")
        assert "challenger" in card
        page.wait("document.querySelector('img[src*=grid]').naturalWidth > 0")  # the picture of the card is there


def test_promotion_by_deployment_and_by_make(visit: Visit, served: Served) -> None:
    done = visit.shell.run(SECOND_SHELL[0], command("prefect deployment run promote/champion"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "promoted: it passed the gate and a person chose it" in " ".join(done.stdout.split())
    again = visit.shell.run(command("make promote"))
    assert (again.returncode, again.stderr) == (0, "")
    verdict = "Verdict: champion stays (balanced, version 1 in the registry): version 1 is the champion"
    assert again.stdout.splitlines()[0] == verdict


def test_a_second_shell_starts_a_run(visit: Visit, served: Served) -> None:
    done = visit.shell.run(*SECOND_SHELL)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "Completed('champion stays: version 1 is the champion" in said, "the same candidate again"
    if STAGES == "toy":
        assert sorted(stages_run(visit.folder)) == sorted(set(stages_run(visit.folder))), "no stage runs twice"


@pytest.fixture(scope="module")
def unproven(visit: Visit, served: Served) -> str:
    """A version that somebody adds by MLflow's API beside the champion, version 1: a copy of it, without a statement."""
    if served.champion() != "1":
        assert visit.shell.run(command("make promote")).returncode == 0
    first = served.mlflow("/model-versions/get?name=textcraftor-tiny&version=1", "GET")["model_version"]
    made = served.mlflow("/model-versions/create", name="textcraftor-tiny", source=first["source"], run_id=first["run_id"])
    return str(made["model_version"]["version"])


def test_an_alias_moved_by_the_api_is_put_back_by_the_webhook(visit: Visit, served: Served, unproven: str) -> None:
    before = corrections(visit)
    move_alias(served, unproven)
    wait_for_correction(visit, served, before)
    tags = served.mlflow(f"/model-versions/get?name=textcraftor-tiny&version={unproven}", "GET")["model_version"]["tags"]
    assert [f"was on version {unproven}" in each["value"] for each in tags if each["key"] == "alias_corrected"] == [True]


@needs_browser
def test_an_alias_moved_on_mlflows_page_is_put_back(visit: Visit, served: Served, unproven: str, tmp_path: Path) -> None:
    before = corrections(visit)
    page = Page(served.model.replace("?", f"/versions/{unproven}?"), tmp_path / "profile", width=1600)
    with contextlib.closing(page):
        page.wait_for("Version " + unproven, "Aliases")
        page.wait("document.querySelector('[title=\"Add aliases\"]') != null")
        page.value("document.querySelector('[title=\"Add aliases\"]').click()")
        page.wait_for("Save aliases")
        page.wait("document.querySelector('[role=dialog] input') != null")
        page.value("document.querySelector('[role=dialog] input').focus()")
        page.press("champion", "Enter")
        page.click("Save aliases")
        wait_for_correction(visit, served, before)


def test_where_no_webhook_arrives_the_flow_puts_the_alias_back(visit: Visit, served: Served, unproven: str) -> None:
    (webhook,) = served.mlflow("/webhooks", "GET")["webhooks"]
    served.mlflow(f"/webhooks/{webhook['webhook_id']}", "DELETE")
    time.sleep(6)  # the server remembers it for five seconds
    move_alias(served, unproven)
    assert served.champion() == unproven, "nobody watches any more"
    done = visit.shell.run(*SECOND_SHELL, f"{command('prefect deployment run watch/champion')} --watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert served.champion() == "1"


@needs_models
def test_a_run_with_settings_of_its_own(visit: Visit, served: Served) -> None:
    done = visit.shell.run(SECOND_SHELL[0], command("prefect deployment run textcraftor/full --watch --param settings"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_nobody_elses_server_was_called(visit: Visit) -> None:
    assert visit.callers == []
    assert not visit.theirs.exists()


def test_stages_by_hand(visit: Visit) -> None:
    lines = [line for line in BY_HAND if STAGES != "toy" or line.startswith(WITHOUT_MODELS)]
    done = visit.shell.run(*lines)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"Running stage '(.*)'", done.stdout)[0] == "resolve"
    assert "train@balanced" not in re.findall(r"Running stage '(.*)'", done.stdout), (
        "the flow made it, so nothing is left to do"
    )


@needs_models
def test_prompts_of_ones_own(visit: Visit, served: Served) -> None:
    stop(served.ui, served.group)  # `make full` is refused beside it
    (visit.folder / "my_prompts.txt").write_text(
        "".join(f"a {size} red circle number {i}\n" for i in range(50) for size in ("small", "large"))
    )
    assert visit.shell.run(command("make full PROMPTS=")).returncode in (0, 3)
    assert visit.shell.run(command("make full")).returncode == 0
    assert visit.shell.run(BY_HAND[0], command("textcraftor doctor")).returncode in (0, 1)


def test_an_experiment_shows_its_figures_and_is_taken_back(visit: Visit) -> None:
    if not (visit.folder / ".git").exists():
        pytest.skip("these tests run without Git, and DVC keeps experiments in it")
    identity = ("git config user.name visitor", "git config user.email visitor@localhost")  # DVC keeps experiments as commits
    done = visit.shell.run(*identity, BY_HAND[0], command("dvc exp run"))
    assert done.returncode == 0, done.stdout + done.stderr
    done = visit.shell.run(BY_HAND[0], "dvc metrics show --json", "dvc plots show", f"{command('dvc exp show')} --csv")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics, page, table = (part.strip() for part in re.split(r"\n(?=file://)|\n(?=Experiment,)", done.stdout))
    figures = json.loads(metrics)[""]["data"]["data/reports/balanced/metrics.json"]["data"]
    assert figures["judges"]["oracle"]["ci_low"] <= figures["judges"]["oracle"]["delta"]
    assert "loss of the training" in Path(unquote(page.removeprefix("file://"))).read_text()
    columns = table.splitlines()[0].split(",")
    assert "data/reports/balanced/metrics.json:judges.oracle.delta" in columns and "50" in table.splitlines()[1].split(",")
    done = visit.shell.run(BY_HAND[0], command("git checkout"), "dvc repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this is train" not in done.stdout, "everything comes back from the cache"


def test_no_tracked_file_was_changed(visit: Visit) -> None:
    if not (visit.folder / ".git").exists():
        pytest.skip("these tests run without Git, so this is no clone")
    assert visit.shell.run("git diff --stat HEAD").stdout == ""
