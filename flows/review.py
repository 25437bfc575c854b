"""A person's review of a challenger: the run is suspended, and Prefect's page of it asks for the decision in a form."""

from prefect import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from tasks.decision import Decision


class Review(RunInput):
    """What a reviewer decides. Reviewer and reason become part of the signed promotion."""

    approve: bool = Field(title="Make it champion", description="No leaves the present champion where it is.")
    reason: str = Field(min_length=1, max_length=300, title="Reason", description="It stands in the record of promotions.")
    reviewer: str = Field(min_length=1, max_length=80, title="Reviewer", description="Your name, as others know it.")


def ask_for_review(challenger: Decision) -> Review:
    """The review of a challenger. The first call suspends the run: its process ends, and whoever resumes it fills in the form.

    The resumed run starts from the top, with every stage unchanged, and comes here again. A review counts for the version that
    the reviewer saw: if the run has made another one meanwhile, it is suspended again.
    """
    form = Review.with_initial_data(description=describe(challenger))
    return suspend_flow_run(wait_for_input=form, key=f"version-{challenger.version}-{challenger.digest}")


def describe(challenger: Decision) -> str:
    """What the form says above its fields, in markdown."""
    page = f"[Its page in MLflow]({challenger.page}) has the card, the pictures and the report. " if challenger.page else ""
    _, _, compared = challenger.why.partition(". ")
    return (
        f"**Version {challenger.version}, {challenger.candidate}, passed the gate.** {challenger.worse} {compared}\n\n"
        f"{page}Approve it, and it becomes champion."
    )
