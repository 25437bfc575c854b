"""The configuration: what it resolves to, and how it refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from textcraftor import config
from textcraftor.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("profile: tiny\n")
    return path


def test_the_params_of_the_project_resolve() -> None:
    run = config.load(ROOT / "params.yaml")
    assert run.profile == "tiny" and set(run.mixes) == {"balanced", "aesthetic"}


def test_overrides_replace_single_values(params: Path) -> None:
    params.write_text("profile: tiny\nmixes: [balanced]\ntrain: {steps: 7}\n")
    run = config.load(params, {"train": {"batch_size": 3}})
    assert (run.train.steps, run.train.batch_size, run.mixes) == (7, 3, ("balanced",))
    assert run.train.learning_rate == config.load(ROOT / "params.yaml").train.learning_rate


def test_a_key_that_says_profile_is_as_the_profile_has_it(params: Path) -> None:
    plain = config.load(params)
    params.write_text("profile: tiny\ntrain: {steps: profile, batch_size: 3}\n")
    assert config.load(params).train == plain.train.model_copy(update={"batch_size": 3})


def test_dvc_finds_the_keys_that_people_change_in_params_yaml() -> None:
    """Without them `dvc exp run -S train.steps=4` is an error; a misspelt one would never be noticed."""
    run, written = config.load(ROOT / "params.yaml"), yaml.safe_load((ROOT / "params.yaml").read_text())
    listed = [(section, key) for section, keys in written.items() if isinstance(keys, dict) for key in keys]
    assert ("train", "steps") in listed
    for section, key in listed:
        assert key in type(getattr(run, section)).model_fields


def test_a_switch_is_a_fraction_of_any_number_of_steps(params: Path) -> None:
    assert [config.switch_step(0.4, steps) for steps in (10, 25, 50)] == [4, 10, 20]
    run = config.load(params, {"chain": {"num_inference_steps": 50}, "train": {"num_inference_steps": None}})
    assert run.train_chain.num_inference_steps == 50


def test_training_and_sampling_have_their_own_switch(params: Path) -> None:
    run = config.load(params, {"train": {"switch_at": 0.4}})
    assert run.sampler.switch_at == config.load(params).sampler.switch_at != run.train.switch_at


def test_a_candidate_for_each_mix_and_each_unet(params: Path) -> None:
    assert config.load(params, {"unet_mixes": ["balanced"]}).candidates == ("balanced", "aesthetic", "balanced-unet")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sampler": {"switch_at": 1.4}}, r"sampler\.switch_at: .* 1 \(got 1\.4\)\. It is a fraction of the chain"),
        ({"sampler": {"swich_at": 0.4}}, r"Unknown key 'sampler\.swich_at'.*Did you mean 'sampler\.switch_at'\?"),
        ({"trian": {}}, r"Unknown key 'trian'\. Known: .*Did you mean 'train'\?"),
        ({"mix": {"balanced": {"hps": 1}}}, r"mix\.balanced: Unknown reward 'hps'.*Did you mean 'hpsv2'\?"),
        ({"mix": {"balanced": {"clip": 0}}}, r"mix\.balanced has no CLIP constraint"),
        ({"mixes": ["balance"]}, r"Unknown mix 'balance'.*Did you mean 'balanced'\?"),
        ({"unet_mixes": ["aesthetics"]}, r"unet_mixes: Unknown mix 'aesthetics'"),
        ({"profile": "tniy"}, r"Unknown profile 'tniy'.*Did you mean 'tiny'\?"),
        (
            {"train": {"grad_steps": 9, "switch_at": 0.5}},
            r"train\.grad_steps = 9 is more than the 3 steps that train\.switch_at = 0\.5",
        ),
        ({"evaluate": {"judges": ["orcale"]}}, r"Unknown judge 'orcale'"),
        ({"gate": {"champion_margin": {"contrast": 0.1}}}, r"gate\.champion_margin: Unknown judge 'contrast'"),
        ({"evaluate": {"prompts": 9999}}, r"evaluate\.prompts = 9999 is more than prompts\.heldout"),
        ({"train": {"images_per_prompt": 5}}, r"train\.batch_size = 12 is no multiple of train\.images_per_prompt = 5"),
        ({"rewards": {"clip": {"kind": "diversity"}}}, r"mix\.balanced: clip compares the images of a prompt"),
        ({"prepare": {"batch_size": 48, "shard_rows": 100}}, r"shard_rows = 100 is no multiple .* Take 96"),
        ({"train": {"steps": 0, "batch_size": 0}}, r"train\.steps: .*\(1 more error\)"),
    ],
)
def test_an_invalid_value_is_one_line(params: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config.load(params, overrides)
    assert "\n" not in str(error.value)


def test_a_mix_without_the_constraint_can_be_allowed_explicitly(params: Path) -> None:
    run = config.load(params, {"mix": {"balanced": {"clip": 0}}, "train": {"allow_without_clip": True}})
    assert run.mix["balanced"]["clip"] == 0


@pytest.mark.parametrize("content", [b"a: [", b"- list", b"\xff\xfe"])
def test_a_params_file_that_is_no_mapping_is_refused(params: Path, content: bytes) -> None:
    params.write_bytes(content)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        config.load(params)


def test_the_resolved_yaml_resolves_to_itself(params: Path) -> None:
    run = config.load(params)
    params.write_text(config.resolved_yaml(run))
    assert config.load(params) == run


def test_every_field_is_described() -> None:
    """Fields that hold a section are described by its docstring; the exceptions say what they are by their names."""
    exceptions = {"kind", "seed", "metric", "at_least", "why"}
    models = [model for model in vars(config).values() if isinstance(model, type) and issubclass(model, config.Section)]
    assert len(models) > 10
    undescribed = {
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not (field.description or name in exceptions or field.annotation in models)
    }
    assert not undescribed


def test_every_profile_resolves(params: Path) -> None:
    for path in config.PROFILES.glob("*.yaml"):
        params.write_text(yaml.safe_dump({"profile": path.stem}))
        assert config.load(params).profile == path.stem


def test_overrides_are_parsed_from_arguments() -> None:
    assert config.parsed(["train.steps=3", "train.compile=true", "mixes=[a, b]"]) == {
        "train": {"steps": 3, "compile": True},
        "mixes": ["a", "b"],
    }
    for wrong in ("train.steps", "=3", "a=[1"):
        with pytest.raises(ConfigError, match=r"KEY=VALUE|not YAML"):
            config.parsed([wrong])


@pytest.fixture
def own(params: Path) -> Path:
    """A profile of the user's own in the workspace: the tiny one, changed."""
    tiny = yaml.safe_load((config.PROFILES / "tiny.yaml").read_text())
    path = params.parent / "profiles/mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(config.merge(tiny, {"train": {"steps": 3}})))
    return path


@pytest.mark.parametrize("name", ["mine", "profiles/mine.yaml"])
def test_a_profile_may_be_a_file_of_the_workspace(params: Path, own: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # relative to the workspace, never to the current folder
    params.write_text(yaml.safe_dump({"profile": name, "train": {"batch_size": 2}}))
    run = config.load(params)
    assert (run.profile, run.train.steps, run.train.batch_size) == (name, 3, 2)
    params.write_text("profile: tiny\ntrain: {steps: 9}\n")
    run = config.load(params, profile=name)
    assert (run.profile, run.train.steps) == (name, 3), "overrides of another profile are left out"
    params.write_text(config.resolved_yaml(run))
    assert config.load(params) == run


def test_errors_and_lists_name_the_profiles_of_the_workspace(params: Path, own: Path) -> None:
    assert config.profile_files(params.parent) == {path.stem: path for path in (*config.PROFILES.glob("*.yaml"), own)}
    with pytest.raises(
        ConfigError, match=r"Unknown profile 'mien'. Known: mine, .*tiny\. Did you mean 'mine'\?.*profiles/NAME"
    ):
        config.load(params, {"profile": "mien"})
    with pytest.raises(ConfigError, match=r"other/mine\.yaml does not exist"):
        config.load(params, {"profile": "other/mine.yaml"})


def test_a_profile_may_not_take_the_name_of_a_shipped_one(params: Path, own: Path) -> None:
    own.rename(own.with_name("sd15.yaml"))
    with pytest.raises(ConfigError, match=r"profiles/sd15\.yaml has the name of a shipped profile.*Rename it"):
        config.load(params)
