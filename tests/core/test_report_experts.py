"""The report's table of experts: multiples of the mean, idle ones, a cell for each."""

import re
from typing import Any

import pytest

from triptych_core.report.expert_load import describe_load
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
    assert re.findall(r">([\d.]+)<", f">{first}") == ["1", "1.5", "0.5", "0", "0.811"]
    assert re.findall(r">([\d.]+)<", f">{second}") == ["2", "2", "0", "1", "0.000"]
    assert page.count("<rect") == 4
    assert 'fill-opacity="0.75"' in page


def test_a_dense_run_has_none() -> None:
    assert not list(draw_experts([{"step": 1}]))


def test_text_and_images_have_tables_of_their_own() -> None:
    step = {
        "step": 3,
        "expert_load": [[30.0, 10.0, 0.0, 0.0], [8.0, 8.0, 8.0, 8.0]],
        "expert_load_images": [[20.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
    }
    page = "".join(draw_experts([step]))
    assert page.index("Tokens of text") < page.index("Tokens of images")
    assert page.count("<rect") == 3 * 8
    found = describe_load(step)
    assert found["expert_max_share"] == [0.75, 0.25]
    assert found["expert_max_share_text"] == [0.5, 0.25]
    assert found["expert_max_share_images"] == [1.0, 0.0]
    assert found["expert_entropy_text"] == pytest.approx([0.5, 1.0])
    assert found["expert_entropy_images"] == pytest.approx([0.0, 0.0])
    assert found["expert_entropy"][1] == pytest.approx(1.0)
    assert [*describe_load({"expert_load": [[1.0, 3.0]]})] == ["expert_entropy", "expert_max_share"]
    assert not describe_load({})
