"""Tests of fetching from a hub (a small one on loopback), a URL and a folder."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from tests.hub import COMMIT, Hub, serving
from textcraftor.config import Config, Download, load, resolved_yaml
from textcraftor.errors import ConfigError, ModelError
from textcraftor.fetch import LOCK, Fetched, fetch, missing_files, read_lock, require, transfer
from textcraftor.layout import PARTIAL_DOWNLOADS

WEIGHTS = save({"weight": torch.arange(60_000, dtype=torch.float32)})
CONFIG = b'{"hidden_size": 8}'
FILES = {"acme/base/model.safetensors": WEIGHTS, "acme/base/config.json": CONFIG}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's client write small chunks. It writes 10 MB at a time, and loses the last chunk of a broken connection."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(dict(FILES))) as running:
        yield running


def run_with_download(tmp_path: Path, **more: Any) -> Config:
    """A run whose profile downloads acme/base; `more` replaces fields of the download, None removes one."""
    params = tmp_path / "params.yaml"
    params.write_text("profile: tiny\n")
    files = {"config.json": "", "model.safetensors": ""}
    download = {"to": "weights/base", "hub": "acme/base", "revision": COMMIT, "files": files, **more}
    return load(params, {"downloads": {"base": {key: value for key, value in download.items() if value is not None}}})


def fetch_all(config: Config, root: Path, hub: Hub | None = None, **more: Any) -> list[Fetched]:
    return list(fetch(config, root, mirror=hub.address if hub else "", **more))


def test_missing_files_are_downloaded_and_present_ones_stay(tmp_path: Path, hub: Hub) -> None:
    run = run_with_download(tmp_path)
    with pytest.raises(ModelError, match=r"weights/base/config\.json is missing \(2 files.*textcraftor fetch --profile tiny"):
        require(run, tmp_path)
    assert [fetched.action for fetched in fetch_all(run, tmp_path, hub)] == ["downloaded", "downloaded"]
    assert (tmp_path / "weights/base/model.safetensors").read_bytes() == WEIGHTS
    assert (tmp_path / "weights/base/config.json").read_bytes() == CONFIG
    assert not missing_files(run, tmp_path) and not list((tmp_path / PARTIAL_DOWNLOADS).iterdir())
    require(run, tmp_path)
    requests = len(hub.requests)
    assert [fetched.action for fetched in fetch_all(run, tmp_path, hub)] == ["present", "present"]
    assert len(hub.requests) == requests, "files that are present and intact need no request"


def test_the_profile_can_name_a_mirror(tmp_path: Path, hub: Hub) -> None:
    run = run_with_download(tmp_path).model_copy(update={"mirror": hub.address})
    assert [fetched.action for fetched in fetch_all(run, tmp_path)] == ["downloaded", "downloaded"]


def test_the_environment_can_name_a_mirror(tmp_path: Path, hub: Hub) -> None:
    """HF_ENDPOINT is read when the hub's client is imported, so only a new process sees it."""
    (tmp_path / "params.yaml").write_text(resolved_yaml(run_with_download(tmp_path)))
    command = [sys.executable, "-m", "textcraftor.cli", "fetch"]
    environment = {**os.environ, "HF_ENDPOINT": hub.address}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("downloaded") == 2, done.stderr
    assert (tmp_path / "weights/base/model.safetensors").read_bytes() == WEIGHTS


def test_an_interrupted_download_resumes(tmp_path: Path, hub: Hub) -> None:
    run = run_with_download(tmp_path, files={"model.safetensors": sha256(WEIGHTS)})
    hub.cut_after = 100_000
    with pytest.raises(
        ModelError, match=r"model\.safetensors of acme/base@0123456 could not be downloaded.*0\.1 MB of it are kept"
    ):
        fetch_all(run, tmp_path, hub)
    assert not (tmp_path / "weights").exists() and not (tmp_path / LOCK).exists()
    (part,) = (tmp_path / PARTIAL_DOWNLOADS).iterdir()
    assert part.read_bytes() == WEIGHTS[:100_000]
    hub.cut_after, hub.down = None, False
    hub.requests.clear()
    assert [fetched.action for fetched in fetch_all(run, tmp_path, hub)] == ["downloaded"]
    assert [range_ for method, _, range_ in hub.requests if method == "GET"] == ["bytes=100000-"]
    assert (tmp_path / "weights/base/model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("source", ["the profile", "weights.lock.json", "the hub"])
def test_a_file_with_a_wrong_sha256_is_refused(tmp_path: Path, hub: Hub, source: str) -> None:
    other = save({"weight": torch.zeros(60_000)})
    pin = sha256(WEIGHTS) if source == "the profile" else ""
    run = run_with_download(tmp_path, files={"model.safetensors": pin})
    if source == "weights.lock.json":
        fetch_all(run, tmp_path, hub)
        (tmp_path / "weights/base/model.safetensors").unlink()
    if source == "the hub":
        hub.wrong_content["acme/base/model.safetensors"] = other
    else:
        hub.files["acme/base/model.safetensors"] = other
    with pytest.raises(
        ModelError, match=rf"model\.safetensors of acme/base@0123456: its sha256 is {sha256(other)}, but {source}"
    ):
        fetch_all(run, tmp_path, hub)
    assert not (tmp_path / "weights/base/model.safetensors").exists()
    assert not list((tmp_path / PARTIAL_DOWNLOADS).iterdir()), "and the next call must not resume from it"


def test_a_file_that_changed_on_disk_is_fetched_again(tmp_path: Path, hub: Hub) -> None:
    run = run_with_download(tmp_path)
    fetch_all(run, tmp_path, hub)
    (tmp_path / "weights/base/config.json").write_bytes(b"{}")
    assert [fetched.action for fetched in fetch_all(run, tmp_path, hub)] == ["downloaded", "present"]
    assert (tmp_path / "weights/base/config.json").read_bytes() == CONFIG


def test_another_revision_is_fetched_and_a_mirror_with_another_commit_is_refused(tmp_path: Path, hub: Hub) -> None:
    fetch_all(run_with_download(tmp_path), tmp_path, hub)
    newer = run_with_download(tmp_path, revision="f" * 40)
    with pytest.raises(ModelError, match=r"the hub answered with commit 0123456"):
        fetch_all(newer, tmp_path, hub)
    hub.commit = "f" * 40
    assert [fetched.action for fetched in fetch_all(newer, tmp_path, hub)] == ["downloaded", "downloaded"]
    assert {entry["origin"] for entry in read_lock(tmp_path).values()} == {f"acme/base@{'f' * 40}"}


@pytest.mark.parametrize("content", [WEIGHTS[:-1000], b"not safetensors at all"])
def test_a_damaged_file_is_refused_without_a_pin_too(tmp_path: Path, hub: Hub, content: bytes) -> None:
    hub.files["acme/base/model.safetensors"] = content
    with pytest.raises(ModelError, match=r"model\.safetensors of acme/base@0123456 is damaged"):
        fetch_all(run_with_download(tmp_path, files={"model.safetensors": ""}), tmp_path, hub)
    assert not (tmp_path / "weights").exists() or not list((tmp_path / "weights").rglob("*.safetensors"))
    assert read_lock(tmp_path) == {} and not list((tmp_path / PARTIAL_DOWNLOADS).iterdir())


def torch_file(path: Path, content: Any) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


def test_a_torch_file_is_converted_once_and_pinned_by_its_published_sha256(tmp_path: Path, hub: Hub) -> None:
    tensors = {"visual.weight": torch.randn(3, 4).half(), "logit_scale": torch.tensor(4.6)}
    published = torch_file(tmp_path / "made.pt", {"epoch": 3, "state_dict": tensors})
    hub.files["acme/base/HPS_v2_compressed.pt"] = published
    run = run_with_download(tmp_path, files={"HPS_v2_compressed.pt": sha256(published)})
    (fetched,) = fetch_all(run, tmp_path, hub)
    assert fetched.path == Path("weights/base/HPS_v2_compressed.safetensors")
    stored = load_file(tmp_path / fetched.path)
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[key], tensors[key]) for key in tensors)
    assert [path.name for path in (tmp_path / "weights/base").iterdir()] == ["HPS_v2_compressed.safetensors"]
    entry = read_lock(tmp_path)[str(fetched.path)]
    assert entry["published_sha256"] == sha256(published) and entry["sha256"] == sha256((tmp_path / fetched.path).read_bytes())
    assert [fetched.action for fetched in fetch_all(run, tmp_path, hub)] == ["present"]


def test_a_converted_file_gets_the_name_that_libraries_look_for(tmp_path: Path, hub: Hub) -> None:
    hub.files["acme/base/open_clip_pytorch_model.bin"] = torch_file(tmp_path / "made.bin", {"a": torch.ones(2)})
    (fetched,) = fetch_all(run_with_download(tmp_path, files={"open_clip_pytorch_model.bin": ""}), tmp_path, hub)
    assert fetched.path.name == "open_clip_model.safetensors"


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_nothing_is_unpickled(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bombs = [pickle.dumps(Bomb()), torch_file(tmp_path / "bomb.pt", {"state_dict": Bomb()})]
    for content in bombs:
        hub.files["acme/base/model.pt"] = content
        with pytest.raises(ModelError, match=r"model\.pt of acme/base@0123456: .*Refused and deleted"):
            fetch_all(run_with_download(tmp_path, files={"model.pt": sha256(content)}), tmp_path, hub)
    assert not (tmp_path / "exploded").exists() and not list((tmp_path / PARTIAL_DOWNLOADS).iterdir())
    assert not list((tmp_path / "weights").rglob("*.safetensors"))


def test_a_download_from_a_url_resumes(tmp_path: Path, hub: Hub) -> None:
    hub.files["/head.safetensors"] = WEIGHTS
    run = run_with_download(
        tmp_path, hub=None, revision=None, url=f"{hub.address}/head.safetensors", files={"head.safetensors": sha256(WEIGHTS)}
    )
    hub.cut_after = 50_000
    with pytest.raises(ModelError, match="could not be downloaded"):
        fetch_all(run, tmp_path)
    hub.cut_after, hub.down = None, False
    fetch_all(run, tmp_path)
    assert hub.requests[-1][2] == "bytes=50000-"
    assert (tmp_path / "weights/base/head.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "layout", ["acme/base", "base", f"models--acme--base/snapshots/{COMMIT}", f"hub/models--acme--base/snapshots/{COMMIT}"]
)
def test_files_can_be_taken_from_a_local_folder(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "get_hf_file_metadata", None)  # a request would raise TypeError
    local = tmp_path / "local"
    (local / layout).mkdir(parents=True)
    (local / layout / "model.safetensors").write_bytes(WEIGHTS)
    with pytest.raises(
        ModelError, match=r"config\.json of acme/base@0123456 is not in .*local\. Looked for base/config\.json, acme"
    ):
        fetch_all(run_with_download(tmp_path), tmp_path, folder=local)
    (local / layout / "config.json").write_bytes(CONFIG)
    assert [fetched.action for fetched in fetch_all(run_with_download(tmp_path), tmp_path, folder=local)] == [
        "copied",
        "copied",
    ]
    assert (local / layout / "config.json").exists(), "files are copied, not moved"


def test_a_pinned_file_is_found_anywhere_in_the_folder_an_unpinned_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    pinned = run_with_download(tmp_path, files={"model.safetensors": sha256(WEIGHTS)})
    assert [fetched.action for fetched in fetch_all(pinned, tmp_path, folder=tmp_path)] == ["copied"]
    with pytest.raises(ModelError, match="is not in"):
        fetch_all(run_with_download(tmp_path, to="weights/other", files={"model.safetensors": ""}), tmp_path, folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"files": {"nope.json": ""}},
            r"nope\.json of acme/base@0123456 could not be downloaded.*no such file at that revision",
        ),
        ({"hub": "acme/gone"}, r"could not be downloaded"),
    ],
)
def test_a_file_or_repository_that_the_hub_lacks_is_named(
    tmp_path: Path, hub: Hub, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as error:
        fetch_all(run_with_download(tmp_path, **change), tmp_path, hub)
    assert "\n" not in str(error.value)


def test_an_unreachable_server_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"could not be downloaded: .*use --mirror URL"):
        list(fetch(run_with_download(tmp_path), tmp_path, mirror="http://127.0.0.1:1"))


def test_downloads_larger_than_the_disk_are_refused_first(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ModelError, match=r"need about 1000000\.0 GB, .* are free"):
        fetch_all(run_with_download(tmp_path, megabytes=10**9), tmp_path, hub)
    assert not hub.requests


def test_only_the_named_downloads_are_fetched(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ConfigError, match=r"Unknown download 'bse'.*Did you mean 'base'\?"):
        fetch_all(run_with_download(tmp_path), tmp_path, hub, names=["bse"])
    assert len(fetch_all(run_with_download(tmp_path), tmp_path, hub, names=["base"])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": None}, "needs its revision"),
        ({"revision": "main"}, "revision"),
        ({"hub": None, "revision": None}, "give either hub"),
        ({"to": "../elsewhere"}, "must stay inside the workspace"),
        ({"files": {"/etc/passwd": ""}}, "must stay inside the workspace"),
        ({"files": {"a.json": "abc"}}, "files"),
    ],
)
def test_an_invalid_download_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_with_download(tmp_path, **change)


def test_an_unreadable_lock_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"weights/base/config.json": []}))
    with pytest.raises(ModelError, match=r"weights\.lock\.json is no record"):
        read_lock(tmp_path)


def test_every_field_of_a_download_is_described() -> None:
    for name, field in Download.model_fields.items():
        assert field.description, name
