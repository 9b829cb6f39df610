"""Each command of ours that a page, a message or a file to copy prints is one, and runs as it is printed."""

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from click.exceptions import UsageError
from redis import Redis
from typer.main import get_command
from typer.testing import CliRunner

from keye.config import keys
from keye.config.quarantine import entry_of
from keye.producer import Client, JobFailed
from keye.producer.cli import app as keye
from keye.producer.shell import ExitCode
from keye.worker.daemon.cli import app as keye_worker
from tests.acceptance.conftest import ECHO, PICTURE, Start
from tests.support.checkout import ROOT

PROGRAMS = {"keye": keye, "keye-worker": keye_worker}
PAGES = [*ROOT.glob("[!C]*.md"), ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("worker/*/README.md")]
TO_COPY = [
    *ROOT.glob("config/*.example"),
    *ROOT.glob("deploy/**/*.*"),
    ROOT / "Dockerfile",
    ROOT / "docker-compose.yml",
]
SOURCES = [path for room in ("config", "producer", "worker") for path in ROOT.glob(f"{room}/**/*.py")]
# Spoken of, and named for short: they want an id, a file, a question or a yes.
NAMES = {
    f"keye {name}"
    for name in (
        "submit",
        "watch",
        "result",
        "cancel",
        "cancel --all-queued",
        "dead",
        "dead show",
        "dead purge",
        "batch run",
        "batch",
    )
}
# What they do takes a GPU, minutes or the whole host; tests/acceptance starts some of them in other files.
ONLY_READ = {
    "keye-worker run",
    "keye-worker ask",
    "keye-worker doctor",
    "keye-worker bench",
    "keye-worker demo",
    "keye schema",
    "keye plan",
}
OURS = r"(?:keye|keye-worker) (?:-|[a-z])"


def printed_commands() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        text = page.read_text()
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if language in ("", "sh"):
                yield from ((page, command) for command in commands_of(block))
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        yield from ((page, span) for span in re.findall(rf"`({OURS}[^`]*)`", prose))
    for file in TO_COPY:
        yield from ((file, command) for command in re.findall(rf"`({OURS}[^`]*)`", file.read_text()))
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from ((source, command) for command in re.findall(rf"[`(]({OURS}[^`)]*)[`)]", node.value))


def commands_of(block: str) -> Iterator[str]:
    for line in block.splitlines():
        # Without what stands before it in a shell, and the remark behind it.
        before = r"\$ |\w+=\$\(|[A-Z_]+=\S+ |docker compose exec worker |.* \| "
        found = re.match(rf"(?:{before})*({OURS}.*?)\)?(?: +#.*)?$", line)
        if found:
            yield found[1]


def test_commands_are_found_wherever_they_stand() -> None:
    found = {(path.name, command) for path, command in printed_commands()}
    assert {
        ("test-without-a-gpu.md", 'keye submit "What do you see?" shapes.png --wait'),
        ("README.md", "keye-worker run"),
        ("README.zh-CN.md", 'keye-worker ask photo.jpg "What is it?"'),
        ("producers.md", 'keye submit "What is in the picture?" cat.jpg'),
        ("producers.md", "keye submit --job - --wait"),
        ("operations.md", "keye-worker plan --visual-tokens 6000 --gpu-memory 24GiB"),
        ("deploy.md", "keye-worker status"),
        ("batches.md", 'keye batch run s3://photos/2026/ "What is shown?" -o captions.jsonl'),
        ("verify.py", "keye dead list --messages"),
        ("status.py", "keye dead list"),
    } <= found


@pytest.mark.holds("docs/producers.md#from-the-shell", 'id=$(keye submit "What is in the picture?" cat.jpg)')
@pytest.mark.holds("README.md#ask-a-question", 'keye submit "What is in the image?" /srv/media/cat.jpg --wait')
def test_every_printed_command_runs_as_printed(
    start: Start,
    client: Client,
    redis: Redis,
    redis_url: str,
    s3_endpoint: str,
    s3_credentials: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    store = boto3.client("s3", endpoint_url=s3_endpoint)
    store.create_bucket(Bucket="photos")
    store.put_object(Bucket="photos", Key="2026/cat.png", Body=PICTURE)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(PICTURE)
    for picture in ("cat.jpg", "shapes.png"):
        (tmp_path / picture).write_bytes(PICTURE)
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "hello"}\n')
    environ = {"KEYE_REDIS_URL": redis_url, "KEYE_MODEL_PATH": str(ROOT / "worker/demo/checkpoint")}
    environ["KEYE_S3_ENDPOINT_URL"] = s3_endpoint
    start(*ECHO, KEYE_S3_ENDPOINT_URL=s3_endpoint, KEYE_S3_BUCKETS="photos").wait_until_ready()
    wrong = []
    for path, command in sorted({(str(path.relative_to(ROOT)), command) for path, command in printed_commands()}):
        failed = client.submit(prompt="?", media=["/nowhere.png"])
        with pytest.raises(JobFailed):
            failed.result(timeout=60)
        unread = redis.xadd(keys.QUARANTINE, entry_of(b"?", "it is no JSON", "gpu-1:7", None))
        filled = re.sub(r"<(?:a )?message id>", unread, command)
        filled = re.sub(r'<(?:the )?job id>|0f8c\.\.\.|\$id|"\$id"', failed.id, filled)
        filled = filled.replace("<code>", "MEDIA_NOT_FOUND").replace("FILE... [--fps 5]", "cat.jpg --fps 5")
        # What stands in a file is the runner's to give.
        filled = re.sub(r" < \S+$", "", filled).replace("./cat.jpg", "cat.jpg")
        program, *arguments = shlex.split(filled)
        if (fault := run(program, arguments, environ, command)) is not None:
            wrong.append(f"{path}: {command}: {fault}")
    assert not wrong, "\n".join(wrong)


def run(program: str, arguments: list[str], environ: dict[str, str], printed: str) -> str | None:
    """What is wrong with it."""
    app, command = PROGRAMS[program], get_command(PROGRAMS[program])
    if printed in NAMES or " ".join([program, *arguments[:1]]) in ONLY_READ:
        try:
            while arguments and hasattr(command, "resolve_command"):
                _, command, arguments = command.resolve_command(command.context_class(command), arguments)
            if printed not in NAMES:
                command.make_context(printed, arguments).close()
        except UsageError as error:
            return error.format_message()
        return None
    job = json.dumps({"prompt": "hello"})
    # Whoever is at a terminal is asked.
    arguments += ["--yes"] * (arguments[:2] == ["dead", "purge"])
    told = CliRunner().invoke(app, arguments, env=environ, input=job)
    if not isinstance(told.exception, SystemExit | None):
        return repr(told.exception)
    return told.output if told.exit_code == ExitCode.INVALID else None


def test_every_printed_install_names_an_extra_that_there_is() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    printed = [text.read_text() for text in (*PAGES, *SOURCES, *TO_COPY, *ROOT.glob("examples/*/*.py"))]
    named = {
        extra
        for text in printed
        for names in re.findall(r"'(?:keye-worker|\.)\[([\w,]+)\]'", text)
        for extra in names.split(",")
    }
    assert {"worker", "upload", "heic"} <= named <= {*extras}


def test_every_printed_make_and_module_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        spoken = re.findall(r"(?:`|^)make ([a-z ]+?)(?:`|  )", text, re.MULTILINE)
        assert {target for words in spoken for target in words.split()} <= targets, page
        for module in re.findall(r"python -m ((?:benchmarks|tools|tests)[\w./]*(?: [a-z_]+\b(?![./]))?)", text):
            file = ROOT / module.replace(".", "/").replace(" ", "/")
            assert file.exists() or file.with_suffix(".py").exists(), f"{page.name}: python -m {module}"


def test_a_full_redis_lets_dead_letters_be_purged(client: Client, redis: Redis, redis_url: str, start: Start) -> None:
    start(*ECHO).wait_until_ready()
    with pytest.raises(JobFailed):
        client.submit(prompt="?", media=["/nowhere.png"]).result(timeout=60)
    redis.config_set("maxmemory", 1)
    try:
        told = CliRunner().invoke(keye, ["dead", "purge", "--all", "--yes"], env={"KEYE_REDIS_URL": redis_url})
    finally:
        redis.config_set("maxmemory", 0)
    assert told.exit_code == 0, told.output
    assert redis.zcard(keys.DEAD_LETTERS) == 0
