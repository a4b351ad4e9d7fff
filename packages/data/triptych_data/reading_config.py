"""Fields of a YAML that say how data are read, alike for every kind of them. Imports no torch."""

from typing import Annotated

from pydantic import Field

from triptych_data.storage.remote_config import RemoteConfig

NumWorkers = Annotated[int, Field(ge=0, le=256)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Remote = Annotated[
    RemoteConfig,
    Field(
        description="How shards named by URL are read: {cache_dir, cache_bytes, block_bytes, "
        "timeout_s, attempts}.",
    ),
]
BadRate = Annotated[
    float,
    Field(
        ge=0.0,
        le=1.0,
        description="Largest share of samples that may fail before the run stops; 0: none.",
    ),
]
Timeout = Annotated[
    float,
    Field(
        gt=0.0,
        description="Seconds within which a worker must give a batch, or it counts as hung.",
    ),
]
ResumeAnyway = Annotated[
    bool,
    Field(
        description="Go on from a checkpoint of other data or settings, and record the difference.",
    ),
]
