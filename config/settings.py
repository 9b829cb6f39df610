"""What an operator can set: `KEYE_*` in the environment, a `.env` file, or both (the environment wins)."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from keye.config.codes import DeviceSetting, PrecisionSetting
from keye.config.env_file import env_file
from keye.config.faults import InvalidSettings
from keye.config.host import share_of_cores, share_of_memory
from keye.config.host_names import listed_host
from keye.config.job import Lifetime
from keye.config.redis_url import RedisUrl, with_password

# Far beyond what anybody waits for, and still what clocks, sockets and Redis can count.
_WEEK = 7 * 86400
_PEBIBYTE = 2**50


def _without_tilde(path: Path) -> Path:
    """Only a shell knows `~`: a `.env` file, systemd and compose hand it on."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path} begins in a home that is not known. Write the whole path.") from None


Limit = Annotated[float, Field(ge=0.1, le=_WEEK)]
NumBytes = Annotated[int, Field(ge=1, le=_PEBIBYTE)]
Folder = Annotated[Path, AfterValidator(_without_tilde)]


def _decoders(earlier: dict[str, Any]) -> int:
    """One a core: they are nice to the engine. A worker has no more than 8 jobs at a time to decode for."""
    return min(share_of_cores(earlier.get("host_workers", 1)), 8)


def _max_decoded_bytes(earlier: dict[str, Any]) -> int:
    return share_of_memory(earlier.get("host_workers", 1))


def _frames_cache_bytes(earlier: dict[str, Any]) -> int:
    return int(earlier.get("max_decoded_bytes", 0)) // 2


VideoDecoder = Literal["pyav", "torchcodec", "decord"]
DecoderIsolation = Literal["worker", "job"]

# Of S3's first years too.
BUCKET = r"[A-Za-z0-9._-]{3,255}"


def read_env_file() -> Mapping[str, str | None]:
    """All that the working directory's `.env` has, settings or not, its names as they are written."""
    return DotEnvSettingsSource(BaseSettings, env_file=env_file(), case_sensitive=True).env_vars


class ProducerSettings(BaseSettings):
    """What the asking side needs: whatever is wrong with a worker's own settings, a producer beside it runs."""

    model_config = SettingsConfigDict(env_prefix="KEYE_", env_ignore_empty=True, extra="ignore", frozen=True)

    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), description="Redis or Valkey: jobs and results"
    )
    redis_password: SecretStr | None = Field(
        default=None, description="as it is, for a `KEYE_REDIS_URL` without one; in the URL @, #, / and % are escaped"
    )
    key_prefix: str = Field(
        default="",
        description="what the names of all keys and channels begin with, such as `blue:`; the same for workers and "
        "producers, so that several deployments share a server",
    )
    result_ttl_seconds: Lifetime = Field(
        default=86400, description="how long an ended job and its outcome can be read; workers' own word counts"
    )
    lease_seconds: float = Field(default=30, ge=1, le=86400, description="a worker silent for this long loses its jobs")
    max_queue_depth: int | None = Field(
        default=None,
        ge=1,
        le=10**9,
        description="a producer is refused new jobs while so many are queued; unset: never",
    )
    s3_endpoint_url: str | None = Field(default=None, description="for S3-compatible stores; unset means AWS")
    upload_prefix: str | None = Field(
        default=None,
        pattern=r"^s3://[^/]+(/.*)?$",
        description="s3://bucket/prefix that `Client.submit` uploads large files and pictures to; unset refuses them",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """By itself the library would read whosever `.env` lies there."""
        return init_settings, env_settings, DotEnvSettingsSource(settings_cls, env_file=env_file())

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Compose files and `.env.example` write settings that nobody set so."""
        return {name: value for name, value in given.items() if not (isinstance(value, str) and not value.strip())}

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Bytes of another encoding reach Python as halves of characters, which no log, URL or message can hold."""
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("it is no UTF-8. Write it in UTF-8, or rename what it names.") from None
        return value

    @field_validator("redis_url")
    @classmethod
    def _can_be_read(cls, url: SecretStr) -> SecretStr:
        RedisUrl.read(url.get_secret_value())
        return url

    @field_validator("key_prefix")
    @classmethod
    def _ends_with_a_mark(cls, prefix: str) -> str:
        """Celery's results would put a mark behind it by themselves, and nothing else of Celery or ours would."""
        if prefix and not re.fullmatch(r"[A-Za-z0-9_.:-]{0,63}[_.:-]", prefix):
            raise ValueError(
                f"{prefix[:80]!r} cannot begin the names of keys. Write up to 64 letters, digits and - _ . : with one "
                "of those four at the end, as in blue:"
            )
        return prefix

    @field_validator("s3_endpoint_url")
    @classmethod
    def _is_an_endpoint(cls, url: str | None) -> str | None:
        """What botocore takes for one, which a producer may not have."""
        if url is None:
            return None
        with suppress(ValueError):
            parts = urlsplit(url)
            host = parts.hostname or ""
            is_host = ":" in host or re.fullmatch(r"((?!-)[a-z\d-]{1,63}(?<!-)\.)*(?!-)[a-z\d-]{1,63}(?<!-)\.?", host)
            is_plain = not (parts.query or parts.fragment or "@" in parts.netloc or re.search(r"\s", url))
            if parts.scheme in ("http", "https") and is_host and is_plain and parts.port != 0:
                return url
        raise ValueError("it is no endpoint of S3. Write https://host:port, the host of letters, digits, '-' and '.'.")

    def full_redis_url(self) -> str:
        """`redis_url`, with `redis_password` in it unless it has one. A secret."""
        password = self.redis_password.get_secret_value() if self.redis_password else ""
        return with_password(self.redis_url.get_secret_value(), password)

    @classmethod
    def read(cls, **given: Any) -> Self:
        """Settings from the environment, and `given` ones. Raises `InvalidSettings`, with every fault."""
        try:
            return cls(**given)
        except ValidationError as error:
            faults = [
                f"KEYE_{str(fault['loc'][0]).upper()}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors(include_input=False)
                # Defaults that follow from a setting that is wrong.
                if fault["type"] != "default_factory_not_called"
            ]
            raise InvalidSettings("; ".join(faults)) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSettings(f".env in {os.getcwd()} cannot be read: {error}") from None

    @classmethod
    def names_given(cls) -> Iterator[str]:
        """Every `KEYE_` name of the environment and `.env`, in capitals, whether or not it is a setting."""
        names = {name.upper(): None for name in (*os.environ, *read_env_file())}
        yield from (name for name in names if name.startswith("KEYE_"))


class Settings(ProducerSettings):
    """Read once, at start; each part of the worker is handed only the piece it needs."""

    require_durable: bool = Field(
        default=False, description="whether a worker refuses a server without an append-only file, instead of warning"
    )
    dead_letter_ttl_seconds: Lifetime = Field(
        default=7 * 86400, description="how long a failed job is a dead letter; its outcome stays as long"
    )

    celery_canvas: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="`queue/task` patterns, joined by ',', of what Celery messages may have called after their job; "
        "none refuses all",
    )
    celery_control: bool = Field(
        default=False, description="whether Celery's remote commands may change and end workers, not only look at them"
    )
    celery_events: bool = Field(default=False, description="whether workers send Celery's events, as Flower shows them")

    log_format: Literal["text", "json"] = Field(default="text", description="one line, or one JSON object, a record")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = Field(
        default=None,
        description="least that is logged, of libraries nothing below INFO; unset: INFO, or the `--loglevel` of a "
        "worker that Celery's own command starts",
    )

    model_path: Folder | None = Field(default=None, description="folder of the Keye-VL checkpoint")
    device: DeviceSetting = Field(default="auto", description="auto takes the GPU where there is one")
    precision: PrecisionSetting = Field(
        default="auto",
        description="auto is bfloat16 on a GPU that has it, else float16, and float32 on a CPU; "
        "int8 and int4 need the extra `quantised`",
    )
    gpu_memory_fraction: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="share of the GPU's memory that weights, cache and the largest step may take",
    )

    prefix_cache: bool = Field(
        default=True,
        description="whether jobs share what the model has computed of the same beginning, text and media; how soon a "
        "job is answered then tells whether somebody asked the like",
    )

    concurrency: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="most jobs in flight in one worker process, from fetch to answer; unset: what fills the engine, "
        "which runs 64, and those that are prepared ahead of it",
    )
    host_workers: int = Field(
        default=1,
        ge=1,
        le=256,
        description="worker processes that share this host's cores and memory; `keye-worker run` counts its own",
    )
    newer_job_seconds: float = Field(
        default=600, ge=0, le=_WEEK, description="how long a job of a newer release is left to workers that know it"
    )
    media_retry_seconds: float = Field(
        default=900,
        ge=0,
        le=_WEEK,
        description="how long unreachable media are tried again for a job that sets no `max_attempts`",
    )
    drain_seconds: float = Field(default=60, ge=0, le=_WEEK, description="how long SIGTERM lets running jobs go on")
    load_seconds: float = Field(
        default=1800,
        ge=10,
        le=_WEEK,
        description="longest reading of the model, first answer included; then the process ends",
    )
    step_seconds: float = Field(
        default=300,
        ge=2,
        le=_WEEK,
        description="longest step of the engine, first compilations too; beyond it the process ends",
    )

    media_roots: Annotated[tuple[Folder, ...], NoDecode] = Field(
        default=(), description="folders local media may be read from, joined by ':'; none means no local media"
    )
    s3_buckets: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="buckets that s3:// media may be in, joined by ','; none means any the credentials open"
    )
    allow_https: bool = Field(default=False, description="whether https:// media are fetched, from public hosts only")
    https_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="hosts that https:// media may be on, joined by ',', `*.example.com` for all below it; none means "
        "any public one",
    )
    fetch_timeout_seconds: Limit = Field(default=30, description="longest silence of a media store")
    max_fetch_seconds: Limit = Field(default=600, description="longest download of one medium")
    cache_folder: Folder = Field(
        default=Path("/var/tmp/keye-media"), description="where fetched media are kept, for all workers of a host"
    )
    cache_bytes: int = Field(
        default=8 * 2**30, ge=0, le=_PEBIBYTE, description="most that is kept there; 0 keeps nothing"
    )
    run_folder: Folder = Field(
        default=Path("/var/tmp/keye-run"), description="where the workers of a host say how they are; best in memory"
    )
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="port of /metrics, /livez and /readyz; unset: none is opened"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address that port is opened on")
    spool_folder: Folder = Field(
        default=Path("/var/tmp/keye-spool"), description="where outcomes wait that Redis could not take"
    )
    max_image_bytes: NumBytes = Field(default=64 * 2**20, description="largest image file")
    max_image_pixels: int = Field(
        default=100_000_000, ge=1, le=10**12, description="width x height, from the header, before decoding"
    )
    max_image_cpu_seconds: int = Field(
        default=10, ge=1, le=1800, description="most CPU time to decode one image; a video may take 1800 s"
    )
    video_decoder: VideoDecoder = Field(
        default="pyav", description="what decodes videos; pyav steps in for clips that the others read wrongly"
    )
    min_frames_per_second: float = Field(
        default=0.5,
        ge=0,
        le=1000,
        description="a result warns where fewer were read of a video that has more, and of which more were asked",
    )
    max_video_bytes: NumBytes = Field(default=4 * 2**30, description="largest video file")
    decoders: int = Field(
        default_factory=_decoders,
        ge=1,
        le=64,
        description="processes that decode media for one worker; unset: one for each core of its share, 8 at most",
    )
    decoder_isolation: DecoderIsolation = Field(
        default="worker",
        description="job: a process that has decoded media of one job meets those of no other, and twice as many run",
    )
    decode_timeout_seconds: Limit = Field(
        default=120,
        description="longest a decoder may take for an image, or to the next frame read of a video (the next 16 where "
        "torchcodec or decord reads it)",
    )
    max_generate_seconds: Limit = Field(
        default=1800, description="longest generation of one answer, its wait in the engine included"
    )
    max_attempt_seconds: Limit = Field(default=3600, description="longest attempt at a job, all stages together")
    max_decoded_bytes: int = Field(
        default_factory=_max_decoded_bytes,
        ge=2**20,
        le=_PEBIBYTE,
        description="most memory for the pixels of all jobs of one worker, and of any one job; unset: an eighth of the "
        "host's, divided by its workers, 4 GiB at most",
    )
    frames_cache_bytes: int = Field(
        default_factory=_frames_cache_bytes,
        ge=0,
        le=_PEBIBYTE,
        description="most memory for decoded media that wait for the next question about them, all of it within "
        "KEYE_MAX_DECODED_BYTES; 0 keeps none; unset: half of that",
    )

    @property
    def num_slots(self) -> int:
        """Threads for jobs: what the engine runs, what is on its way there, and what waits for others to end."""
        return self.concurrency or 192

    @property
    def num_decoder_processes(self) -> int:
        """At most, with those that wait and have seen no job."""
        return self.decoders * (2 if self.decoder_isolation == "job" else 1)

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_capitals(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("media_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value

    @field_validator("s3_buckets", "https_hosts", "celery_canvas", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("s3_buckets")
    @classmethod
    def _are_buckets(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        buckets = tuple(re.sub(r"^s3://([^/]*)/?$", r"\1", bucket, flags=re.IGNORECASE) for bucket in given)
        for bucket in buckets:
            if not re.fullmatch(BUCKET, bucket):
                raise ValueError(f"{bucket!r} is no bucket. Write names of whole buckets: photos,scans.")
        return buckets

    @field_validator("https_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(listed_host, hosts))

    @field_validator("celery_canvas")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if not all(pattern.partition("/")):
                raise ValueError(f"{pattern!r} names no queue and task. Write queue/task, or results/*.")
        return patterns
