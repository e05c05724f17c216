"""The base of the classes of a configuration."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A mapping in which unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
