"""What each table trains and evaluates, on every shipped profile: no training here, only definitions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from textcraftor.ablation.plan import ABLATED, Planned, Planner
from textcraftor.ablation.rows import TABLES, TEXT, UNET, Row, Training
from textcraftor.candidate import Candidate
from textcraftor.config import Config, load, merge, resolve
from textcraftor.errors import ConfigError, PromptError
from textcraftor.layout import BASE, HELDOUT_PROMPTS, TRAIN_PROMPTS, encoder_folder, unet_folder

PROFILES = ("tiny", "sd15", "sd21", "sdxl")


def config(profile: str = "tiny", **ablation: object) -> Config:
    return load("none.yaml", {"ablation": ablation}, profile)


def planner(root: Path, params: Mapping[str, Any]) -> Planner:
    for path in (TRAIN_PROMPTS, HELDOUT_PROMPTS):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(str(path))
    return Planner(params, root)


def trained(rows: list[Row]) -> list[Training]:
    return [row.trained for row in rows if isinstance(row.trained, Training)]


def samples(made: Config, training: Training) -> int:
    """Images that a training sees, by the settings that it runs with."""
    sections = {"mixes": [*made.mixes, ABLATED], "mix": {ABLATED: dict(training.mix)}}
    run = resolve(merge({"profile": made.profile, **sections}, training.settings), Path())
    tunes = [getattr(run, stage.replace("-", "_")) for stage in training.stages]
    return sum(tune.steps * tune.batch_size * tune.accumulation for tune in tunes)


@pytest.mark.parametrize("profile", PROFILES)
def test_all_rows_of_table_1_see_the_same_number_of_images(profile: str) -> None:
    made = config(profile, steps=6, batch_size=None if profile != "tiny" else 12)
    rows = TABLES["table1"].rows(made)
    assert {samples(made, each) for each in trained(rows)} == {
        6 * made.ablation.batch_size if profile == "tiny" else 6 * made.train.batch_size * made.train.accumulation
    }
    every, unet, both = trained(rows)[-3:]
    assert [every.stages, unet.stages, both.stages] == [(TEXT,), (UNET,), (TEXT, UNET)]
    assert every.mix == {name: weight for name, weight in made.mix[made.mixes[0]].items() if weight} == unet.mix == both.mix
    assert (unet.settings["train_unet"]["encoder"], both.settings["train_unet"]["encoder"]) == ("original", "tuned")
    assert both.settings["train"]["steps"] == both.settings["train_unet"]["steps"] == 3
    kinds = {name: made.rewards[name].kind for name in made.rewards}
    for single in trained(rows)[:-3]:
        assert any(kinds[reward] == "clip" for reward in single.mix) and len(single.mix) <= 2


def test_micro_batches_are_no_larger_than_the_runs() -> None:
    made = load("none.yaml", {"train": {"batch_size": 4, "accumulation": 6}, "train_unet": {"batch_size": 3}}, "tiny")
    made = made.model_copy(update={"ablation": made.ablation.model_copy(update={"batch_size": None})})
    both = trained(TABLES["table1"].rows(made))[-1].settings
    assert (both["train"]["batch_size"], both["train"]["accumulation"]) == (4, 6)
    assert (both["train_unet"]["batch_size"], both["train_unet"]["accumulation"]) == (3, 8)
    pairs = made.model_copy(update={"train": made.train.model_copy(update={"images_per_prompt": 5})})
    with pytest.raises(ConfigError, match=r"ablation.batch_size = 24 is no multiple of train.images_per_prompt = 5"):
        TABLES["table1"].rows(pairs)


def test_table_4_has_the_papers_steps_on_the_papers_chain() -> None:
    made = config("sd15")
    rows = TABLES["table4"].rows(made)
    assert made.chain.num_inference_steps == made.train_chain.num_inference_steps == 25
    assert [row.facts["paper"] for row in rows] == ["base", "5/5", "5/10", "5/15", "5/25", "10/10", "15/15"]
    for row in rows[1:]:
        grad_steps, tuned = map(int, row.facts["paper"].split("/"))
        train = row.trained.settings["train"]  # type: ignore[union-attr]
        assert (train["gradient"], train["grad_steps"]) == ("truncated", grad_steps)
        assert train["switch_at"] == pytest.approx(1 - grad_steps / 25)
        assert row.sampling["sampler"]["switch_at"] == pytest.approx(1 - tuned / 25)
    assert len({id(row.trained.mix) for row in rows[1:] if isinstance(row.trained, Training)}) == 6


def test_table_4_takes_the_same_fractions_of_a_shorter_chain() -> None:
    chains = {"chain": {"num_inference_steps": 15}, "train": {"num_inference_steps": 10}}
    rows = TABLES["table4"].rows(load("none.yaml", chains, "tiny"))
    shown = [(row.facts["K in training"], row.facts["tuned in sampling"]) for row in rows[1:]]
    assert shown == [
        *(("2 of 10", f"{tuned} of 15") for tuned in (3, 6, 9, 15)),
        ("4 of 10", "6 of 15"),
        ("6 of 10", "9 of 15"),
    ]


@pytest.mark.parametrize("profile", ["tiny", "sd15"])
def test_every_setting_of_every_table_is_allowed_and_what_rows_have_in_common_is_shared(profile: str, tmp_path: Path) -> None:
    made = config(profile)
    plans = planner(tmp_path, {"profile": profile})
    own = tmp_path / encoder_folder(made.mixes[0]) / "text_encoder"
    own.mkdir(parents=True)
    (own / "config.json").write_text("{}")
    planned: dict[str, list[Planned]] = {name: plans.plan(table.rows(made)) for name, table in TABLES.items()}
    for name, rows in planned.items():
        assert len({each.row.label for each in rows}) == len(rows), name
        assert len({each.report for each in rows}) == len(rows), name
    trainings = {name: {each.training.folder for each in rows if each.training} for name, rows in planned.items()}
    assert len(trainings["table1"]) == len(planned["table1"]) - 1
    assert len(trainings["table4"]) == 3, "one for each K"
    assert not trainings["table5"]
    assert len({each.environment.folder for each in planned["table4"]}) == 4, "one for each switch in sampling"
    assert {each.environment.folder for each in planned["figure6"]} == {each.environment.folder for each in planned["table1"]}
    if made.train.decay == "constant":
        assert trainings["figure6"] & trainings["table1"], "the whole training with the constraint is table 1's"


def test_a_unet_on_the_original_encoder_is_evaluated_without_an_encoder(tmp_path: Path) -> None:
    made = config()
    planned = planner(tmp_path, {"profile": "tiny"}).plan(TABLES["table1"].rows(made))
    unet, both = planned[-2:]
    assert unet.candidate == both.candidate == f"{ABLATED}-unet" and unet.evaluation and both.evaluation
    assert str(unet_folder(ABLATED)) in unet.evaluation.links and str(encoder_folder(ABLATED)) not in unet.evaluation.links
    assert {str(unet_folder(ABLATED)), str(encoder_folder(ABLATED))} <= both.evaluation.links.keys()
    assert planned[0].candidate == BASE and planned[0].weights == Candidate(BASE)


def test_other_prompts_settings_or_budgets_are_other_workspaces(tmp_path: Path) -> None:
    def folders(**params: Any) -> set[Path]:
        plans = planner(tmp_path, {"profile": "tiny", **params})
        rows = TABLES["table1"].rows(plans.config)[:2]
        return {job.folder for each in plans.plan(rows) for job in each.jobs}

    first = folders()
    assert folders() == first
    assert folders(gate={"min_prompts": 40}) == first, "a threshold changes no training"
    environment, training, evaluation = 1, 1, 1
    assert len(folders(ablation={"steps": 7}) - first) == training + evaluation
    assert len(folders(ablation={"prompts": 7}) - first) == environment + evaluation
    (tmp_path / TRAIN_PROMPTS).write_text("other prompts")
    assert (
        not {
            job.folder
            for each in Planner({"profile": "tiny"}, tmp_path).plan(TABLES["table1"].rows(config())[:2])
            for job in each.jobs
        }
        & first
    )


def test_figure_6_takes_the_constraint_away_and_nothing_else() -> None:
    rows = TABLES["figure6"].rows(config(steps=8, points=3))
    assert [row.label for row in rows] == ["base", *(f"{each}, {steps}" for each in ("with", "without") for steps in (2, 4, 8))]
    constrained, alone = trained(rows)[:3], trained(rows)[3:]
    assert [each.mix for each in alone] == [{"aesthetic": 1.0}] * 3 and constrained[0].mix == {"clip": 2.0, "aesthetic": 1.0}
    assert [each.settings for each in constrained] == [each.settings for each in alone]
    assert len({each.settings["train"]["warmup_steps"] for each in alone}) == 1, "a shorter one is the beginning of the longer"


@pytest.mark.parametrize(
    ("table", "ablation", "message"),
    [
        ("table1", {"steps": 1}, "cannot be halved"),
        ("figure6", {"collapse": "clip"}, "is the CLIP constraint itself"),
        ("figure6", {"collapse": "hps"}, "Unknown mix 'hps'. Known: aesthetic, clip, hpsv2, pickscore"),
    ],
)
def test_impossible_settings_are_refused(table: str, ablation: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TABLES[table].rows(config(**ablation))


def test_unknown_rewards_and_missing_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ablation\.rewards\.mine: Unknown reward 'hps'"):
        config(rewards={"mine": {"hps": 1}})
    with pytest.raises(PromptError, match="Run `textcraftor curate` first"):
        Planner({"profile": "tiny"}, tmp_path)


def test_a_mix_on_a_held_out_judge_is_refused_before_anything_runs(tmp_path: Path) -> None:
    plans = planner(tmp_path, {"profile": "tiny", "ablation": {"rewards": {"mine": {"clip": 1, "heldout": 1}}}})
    with pytest.raises(ConfigError, match=r"heldout.*is held out"):
        plans.plan(TABLES["table1"].rows(plans.config))
