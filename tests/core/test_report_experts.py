"""The report's table of experts: multiples of the mean, idle ones, a cell for each."""

import re
from typing import Any

from triptych_core.report.experts import draw_experts


def test_the_last_table_is_shown_layer_by_layer() -> None:
    steps: list[dict[str, Any]] = [
        {"step": 1, "expert_load": [[1, 1], [1, 1]]},
        {"step": 2, "expert_load": [[30, 10], [0, 8]]},
        {"step": 3},
    ]
    page = "".join(draw_experts(steps))
    assert "at step 2" in page
    first, second = (row.split("</tr>")[0] for row in page.split("<tr><th>")[2:])
    assert re.findall(r">([\d.]+)<", f">{first}") == ["1", "1.5", "0.5", "0"]
    assert re.findall(r">([\d.]+)<", f">{second}") == ["2", "2", "0", "1"]
    assert page.count("<rect") == 4
    assert 'fill-opacity="0.75"' in page


def test_a_dense_run_has_none() -> None:
    assert not list(draw_experts([{"step": 1}]))
