"""The attacks and faults that the tests try, by cause, counted from the tests themselves.

    python -m tests.attacks [--write]

Prints the table of docs/attacks.md; with --write it puts it there. A test fails when the page says something else.
"""

import importlib
import math
import re
import sys
from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).parents[1] / "docs/attacks.md"
ATTACK, FAULT = "attack", "fault"
VERIFIER, CHAMPION = "tests.trust.test_verifier", "tests.tasks.test_champion"
# (attack or fault, cause, module, its tests)
ROWS: Final = (
    (ATTACK, "files changed, added, removed or linked in a candidate; weights elsewhere; code, adapters, pickles", VERIFIER,
     ["test_a_changed_folder_is_refused"]),
    (ATTACK, "signed by our own evaluation and not good enough: too few prompts or images, false ids, other judges, also of "
     "diversity, trained on the judge", VERIFIER, ["test_a_signature_does_not_replace_the_verdict"]),
    (ATTACK, "judged on prompts of its training; trainings signed by nobody, by a stranger, for other files; rewards left out",
     VERIFIER, ["test_what_was_trained_on_is_signed_by_the_training"]),
    (ATTACK, "another candidate's statement; a weaker, damaged or missing policy, one of another name; a revoked key", VERIFIER,
     ["test_another_candidates_statement_is_refused", "test_the_policy_that_is_pinned_now_judges",
      "test_a_weaker_policy_at_signing_helps_nobody", "test_without_a_policy_nothing_is_proven",
      "test_a_policy_that_leaves_the_judge_of_diversity_open_is_none", "test_a_damaged_policy_proves_nothing",
      "test_a_policys_name_stays_in_its_folder", "test_a_revoked_key_proves_nothing"]),
    (ATTACK, "envelopes: forged, cut off, of another kind, by a stranger", "tests.signing.test_envelope",
     ["test_a_forgery_does_not_open", "test_what_is_no_json_does_not_open",
      "test_a_statement_of_another_kind_or_of_a_stranger_does_not_open"]),
    (ATTACK, "edited verdicts and scores in the workspace", "tests.tasks.test_evidence",
     ["test_an_edited_gate_record_does_not_help", "test_edited_scores_do_not_help"]),
    (ATTACK, "versions changed in the store, registered by hand, weights changed after the gate", "tests.tasks.test_registry",
     ["test_a_version_changed_in_the_store_is_neither_promoted_nor_fetched",
      "test_a_version_registered_by_hand_is_not_promoted", "test_weights_changed_after_the_gate_are_refused",
      "test_an_alias_that_is_moved_by_hand_has_no_effect_and_is_put_back"]),
    (ATTACK, "the record of promotions: forged, replayed, edited, deleted, renamed; a machine that never saw it; a key that "
     "may not promote", "tests.tasks.test_promotions",
     ["test_nobody_without_the_key_moves_the_champion", "test_a_machine_that_never_saw_the_record_takes_no_broken_one",
      "test_a_key_that_is_not_believed_promotes_nothing"]),
    (ATTACK, "the alias moved or removed by hand; messages of MLflow's webhooks forged, repeated late, signed by another",
     "tests.tasks.test_aliases",
     ["test_an_alias_moved_by_hand_is_put_back_and_the_versions_say_so", "test_a_forged_or_old_message_is_not"]),
    (ATTACK, "weights and base exchanged between proof and load; another base", "tests.test_generate",
     ["test_what_is_served_was_copied_before_it_was_verified", "test_another_base_here_is_refused_in_one_line"]),
    (ATTACK, "hostile requests to a served model (31 more ways: `python -m benchmarks.load`)", "tests.serving.test_server",
     ["test_a_bad_request_is_refused_and_the_next_one_is_drawn", "test_a_false_length_is_refused",
      "test_a_refused_body_of_megabytes_gets_its_answer", "test_slow_and_vanishing_clients_hold_nobody_up",
      "test_more_connections_than_there_are_threads_for_are_closed"]),
    (ATTACK, "an unproven, changed or demoted version in MLflow's own loader; another base (with servers: `python -m "
     "tests.serving.live`)", "tests.serving.test_loading",
     ["test_another_proven_version_is_not_served_whatever_the_alias_says", "test_what_was_changed_is_not_served",
      "test_another_base_is_not_served"]),
    (FAULT, "a champion's evidence damaged or gone", CHAMPION,
     ["test_only_a_person_replaces_a_champion_that_is_damaged",
      "test_a_damaged_download_is_replaced_and_says_nothing_about_the_champion"]),
    (FAULT, "a champion broken in MLflow: run deleted, version deleted, tags changed", CHAMPION,
     ["test_nor_is_one_replaced_that_is_broken_in_mlflow"]),
    (FAULT, "a champion that cannot be read now: locked, unreachable, refused, disk errors", CHAMPION,
     ["test_a_champion_that_cannot_be_read_now_is_not_replaced", "test_a_locked_database_is_retried"]),
    (FAULT, "two promotions at once, on one machine and on two (200 rounds: `python -m tests.tasks.race`)", CHAMPION,
     ["test_promotions_of_a_project_wait_for_each_other",
      "test_a_champion_that_another_machine_promotes_meanwhile_is_compared_with"]),
    (FAULT, "the process dies between any two steps of track, register, challenge, promote", "tests.tasks.test_kills",
     ["test_the_next_run_ends_right"]),
    (FAULT, "runs cut off, artifacts or experiments deleted", "tests.tasks.test_registry",
     ["test_a_run_that_failed_while_logging_is_logged_again", "test_a_run_whose_artifacts_are_gone_is_logged_again",
      "test_a_deleted_experiment_is_restored"]),
)  # fmt: skip


def count(module: str, tests: list[str]) -> int:
    """How many cases pytest makes of the tests. Raises AttributeError for a test that is not there."""
    found = importlib.import_module(module)
    marks = [[mark for mark in getattr(getattr(found, name), "pytestmark", []) if mark.name == "parametrize"] for name in tests]
    return sum(math.prod(len(list(mark.args[1])) for mark in each) for each in marks)


def table() -> str:
    lines, totals = ["| | cause | cases | where |", "|---|---|---:|---|"], {ATTACK: 0, FAULT: 0}
    for kind, cause, module, tests in ROWS:
        cases = count(module, tests)
        totals[kind] += cases
        lines.append(f"| {kind} | {cause} | {cases} | `{module.replace('.', '/')}.py` |")
    return "\n".join([f"{totals[ATTACK]} attacks and {totals[FAULT]} faults.", "", *lines])


def page(text: str) -> str:
    """The page with the table of now."""
    start, end = "<!-- python -m tests.attacks --write -->\n", "<!-- end -->"
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}{table()}\n{end}", text, flags=re.S)


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table())
