"""One page for a recipe: what each step did, how losses fell, what answers are worth."""

from triptych_core.pipeline.plan import Plan
from triptych_core.pipeline.state import State


def write_pipeline_report(plan: Plan, state: State) -> None:
    pass
