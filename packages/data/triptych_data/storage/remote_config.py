"""The part of a configuration about shards on servers; it imports neither torch nor numpy."""

from pydantic import BaseModel, ConfigDict, Field

from triptych_data.storage.open import Storage
from triptych_data.storage.remote import Patience


class RemoteConfig(BaseModel):
    """How shards named by URL are read; local ones need none of it."""

    model_config = ConfigDict(extra="forbid")

    cache_dir: str | None = Field(
        default=None,
        description="Folder on a local disk for what was fetched, shared by all processes of a "
        "host; null: $XDG_CACHE_HOME/triptych/blocks.",
    )
    cache_bytes: int = Field(
        default=20_000_000_000,
        ge=0,
        description="Most bytes in cache_dir; the data fit in it, or epochs fetch them anew; "
        "0: keep nothing, and fetch each sample by itself.",
    )
    block_bytes: int = Field(
        default=1 << 20,
        ge=4096,
        le=1 << 28,
        description="Bytes fetched at once: more for a far server, less for one that is near.",
    )
    timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds without a byte after which a request is dropped."
    )
    attempts: int = Field(
        default=5, ge=1, le=100, description="Requests for the same bytes before the run stops."
    )

    @property
    def storage(self) -> Storage:
        patience = Patience(attempts=self.attempts, timeout=self.timeout_s)
        return Storage(self.cache_dir, self.cache_bytes, self.block_bytes, patience)
