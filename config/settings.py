"""What an operator can set: `KEYE_*` in the environment, a `.env` file, or both (the environment wins)."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Read once, at start; each part of the worker is handed only the piece it needs."""

    model_config = SettingsConfigDict(env_prefix="KEYE_", env_file=".env", extra="ignore", frozen=True)

    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), description="Redis or Valkey: jobs and results"
    )
    result_ttl_seconds: int = Field(
        default=86400, ge=60, description="how long an ended job and its outcome can be read"
    )

    model_path: Path | None = Field(default=None, description="folder of the Keye-VL checkpoint")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes the GPU where there is one")
    precision: Literal["auto", "bfloat16", "float16", "float32", "int8", "int4"] = Field(
        default="auto",
        description="auto is bfloat16 on a GPU that has it, else float16, and float32 on a CPU; "
        "int8 and int4 need the extra `quantised`",
    )

    concurrency: int = Field(default=8, ge=1, le=256, description="jobs in flight in one worker process")
    lease_seconds: float = Field(default=30, ge=1, description="a worker silent for this long loses its jobs")
    drain_seconds: float = Field(default=60, ge=0, description="how long SIGTERM lets running jobs go on")

    media_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(), description="folders local media may be read from, joined by ':'; none means no local media"
    )
    s3_endpoint_url: str | None = Field(default=None, description="for S3-compatible stores; unset means AWS")
    fetch_timeout_seconds: float = Field(default=30, gt=0, description="longest silence of a media store")
    max_image_bytes: int = Field(default=64 * 2**20, ge=1, description="largest image file")
    max_image_pixels: int = Field(
        default=100_000_000, ge=1, description="width x height, from the header, before decoding"
    )
    max_video_bytes: int = Field(default=4 * 2**30, ge=1, description="largest video file")

    @field_validator("media_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value
