"""How many programs and inputs are tried: few and always the same ones, or many and new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

#: hypothesis's own number of examples, by which a profile is measured.
ORDINARY = 100


def register() -> None:
    """For ``pytest tests/models tests/fuzz --hypothesis-profile=long``.

    It does forty times as much as the default, or as many times as the environment says.
    """
    times = int(os.environ.get("HYPOTHESIS_TIMES", "40"))
    settings.register_profile("long", max_examples=times * ORDINARY, print_blob=True)


def profile(examples: int, *, steps: int = 50, shrink: bool = True) -> settings:
    """The settings of one test.

    :param examples: by default; a profile with more of them has so many times as many.
    :param steps: of each run of a state machine.
    :param shrink: False where a failing example takes seconds, because what does not come to
        rest is waited for.
    """
    times = max(1, settings().max_examples // ORDINARY)
    phases = [Phase.explicit, Phase.generate]
    return settings(
        max_examples=examples * times,
        stateful_step_count=steps,
        derandomize=times == 1,
        deadline=None,
        database=None,
        phases=[*phases, Phase.shrink] if shrink else phases,
        suppress_health_check=list(HealthCheck),
    )
