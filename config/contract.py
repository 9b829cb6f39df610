"""How strict every model that crosses the queue is."""

from pydantic import BaseModel, ConfigDict


class Contract(BaseModel):
    """Immutable, and refuses fields it does not know: a misspelt option must never be silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
