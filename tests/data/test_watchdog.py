import logging
import time

import pytest

from tests.data import works
from tests.data.test_workers import run


@pytest.mark.parametrize(
    ("work", "sample", "stack"),
    [
        (works.hanging, 5, "in hanging"),
        (works.hanging_in_c, 6, "in hanging_in_c"),
        (works.stopped, 7, "it wrote none"),
    ],
)
def test_a_hung_worker_is_named_with_its_sample_and_stack(caplog, work, sample, stack):
    started = time.monotonic()
    message = rf"^data\.timeout_s: .* within 0\.5 s, got none from worker 0 on sample {sample};"
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=message):
        list(run(work, timeout=0.5))
    assert time.monotonic() - started < 15  # it did not wait for the hanging to end
    (record,) = caplog.records
    assert stack in record.getMessage()
    assert f"on sample {sample}" in record.getMessage()
