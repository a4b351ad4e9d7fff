"""All hostile files, by what they are."""

from __future__ import annotations

from tests.hostile.case import Case
from tests.hostile.config_cases import config_cases
from tests.hostile.data_cases import data_cases
from tests.hostile.image_cases import image_cases
from tests.hostile.media_cases import media_cases
from tests.hostile.model_cases import model_cases
from tests.hostile.run_cases import run_cases
from tests.hostile.tar_cases import index_cases, tar_cases
from tests.hostile.weight_cases import weight_cases

CASES: list[Case] = [
    *tar_cases(),
    *index_cases(),
    *data_cases(),
    *image_cases(),
    *media_cases(),
    *weight_cases(),
    *model_cases(),
    *config_cases(),
    *run_cases(),
]
