"""A new DeepSpeed that changes a default, or lacks what we use of it, is told before it trains."""

import json

from tests.core.deepspeed_snapshot import FILE, NAMES, differences, snapshot


def test_defaults_and_names_are_those_of_the_version_we_admitted():
    old, new = json.loads(FILE.read_text()), json.loads(json.dumps(snapshot()))
    found = differences(old, new)
    assert not found, (
        "DeepSpeed is not what was admitted; read CONTRIBUTING.md, 'A new DeepSpeed':\n"
        + "\n".join(found)
    )
    assert new["names"] == NAMES  # what was admitted had all of them


def test_a_changed_default_is_a_line():
    old = {"resolved": {"stage 1": {"gradient_clipping": 0.0, "gone": 1}}}
    new = {"resolved": {"stage 1": {"gradient_clipping": 1.0, "came": 2}}}
    assert differences(old, new) == [
        "resolved stage 1 gradient_clipping: 0.0 became 1.0",
        "resolved stage 1 gone: 1 became 'absent'",
        "resolved stage 1 came: 'absent' became 2",
    ]
