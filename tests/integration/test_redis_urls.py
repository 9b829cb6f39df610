"""Every way to write KEYE_REDIS_URL: all that connect read it alike, or all refuse it with one sentence."""

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from pydantic import SecretStr
from redis.exceptions import RedisError

from keye.config.connection import connect
from keye.config.faults import InvalidSettings
from keye.config.settings import ProducerSettings, Settings
from keye.producer import Client, QueueUnavailable, shell
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.findings import Severity, select
from keye.worker.daemon.preflight import check_broker, check_celery_connects
from keye.worker.results.outbox import Spool
from keye.worker.tasks.celery_app import build_app
from tests.chaos.echo_workers import EchoWorkers
from tests.support.certificates import Authority
from tests.support.checkout import PYTHONPATH
from tests.support.redis_server import RedisServer, Sentinels

SECRET = "p@s:s/w#r%d+[x];&?= ü"
USER = "us@er:1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[RedisServer]:
    """Gets in whoever comes by TCP, TLS or a socket, and a user whose name and password hold what URLs escape."""
    folder = tmp_path_factory.mktemp("redis")
    certificate = authority.issue("localhost")
    tls = ["--tls-cert-file", certificate, "--tls-key-file", certificate, "--tls-ca-cert-file", authority.path]
    with RedisServer(folder, "--unixsocket", folder / "redis.sock", "--tls-auth-clients", "optional", *tls) as server:
        server.redis.config_set("tls-port", server.tls_port)
        server.redis.execute_command("ACL", "SETUSER", USER, "on", f">{SECRET}", "~*", "&*", "+@all")
        yield server


@pytest.fixture(scope="module")
def sentinels(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    with Sentinels(tmp_path_factory.mktemp("sentinels"), server.port, "group", num=2) as sentinels:
        yield sentinels


@pytest.fixture
def filled(server: RedisServer, authority: Authority, sentinels: Sentinels) -> Callable[[str], str]:
    """A URL with what is known only now."""
    known = {
        "port": server.port,
        "tls": server.tls_port,
        "socket": server.folder / "redis.sock",
        "ca": authority.path,
        "user": quote(USER, safe=""),
        "password": quote(SECRET, safe=""),
        "hosts": sentinels.hosts,
        "client": authority.issue("client"),
        "locked": authority.issue("locked", "open sesame"),
    }
    return lambda url: url.format(**known)


PLAIN = "redis://127.0.0.1:{port}"
TLS = "rediss://localhost:{tls}/0"


@pytest.mark.holds(
    "docs/operations.md#how-do-i-write-keye_redis_url",
    "Producers, workers and Celery within them read it by the same rules",
    "the server | write",
)
@pytest.mark.holds(
    "docs/operations.md#how-do-i-write-keye_redis_url",
    "`ssl_certfile`, `ssl_keyfile` and `ssl_password` show one of your own.",
    "`ssl_cert_reqs=none` verifies nothing",
    "All take `username`",
)
@pytest.mark.parametrize(
    "url",
    [
        *(PLAIN, PLAIN + "/", PLAIN + "/5", PLAIN + "?db=3", PLAIN + "/?db=3", " " + PLAIN + "/0\n"),
        *("REDIS://localhost:{port}/0", PLAIN + "/0?protocol=2", PLAIN + "/0?protocol=3"),
        PLAIN + "/0?socket_timeout=1&socket_connect_timeout=2.5&max_connections=2&timeout=30",
        PLAIN + "/0?client_name=keye&health_check_interval=0",
        *("unix://{socket}", "unix://{socket}?db=2", "unix://{user}:{password}@{socket}?db=2"),
        *("redis://{user}:{password}@127.0.0.1:{port}/0", PLAIN + "/0?username={user}&password={password}"),
        *(TLS + "?ssl_ca_certs={ca}", TLS + "?ssl_cert_reqs=required&ssl_ca_certs={ca}"),
        *(TLS + "?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={ca}", TLS + "?ssl_cert_reqs=none"),
        "rediss://127.0.0.1:{tls}/4?ssl_ca_certs={ca}&ssl_check_hostname=false",
        TLS + "?ssl_ca_certs={ca}&ssl_certfile={client}",
        TLS + "?ssl_ca_certs={ca}&ssl_certfile={locked}&ssl_keyfile={locked}&ssl_password=open%20sesame",
        *("sentinel://{hosts}/group", "sentinel://{user}:{password}@{hosts}/group/6"),
        "sentinel://127.0.0.1:1,{hosts}/group/0?socket_timeout=4",
    ],
)
def test_a_job_is_answered_over_it(
    url: str, filled: Callable[[str], str], server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYE_REDIS_URL", filled(url))
    settings = Settings.read()
    findings = [*check_broker(settings.full_redis_url(), 30, False), *check_celery_connects(build_app(settings))]
    assert select(findings, Severity.FAULT) == []
    with connect(filled(url)) as redis:
        redis.flushdb()
        workers = EchoWorkers(filled(url), redis, tmp_path, lease_seconds=30)
        try:
            with Client() as client:
                workers.start_ready()
                assert client.submit(prompt="hello").result(30).answer == "hello"
        finally:
            workers.end()
    assert SECRET not in workers.logs
    assert quote(SECRET, safe="") not in workers.logs


# What is refused, and some of the sentence that says so.
REFUSED = {
    "127.0.0.1:6379/0": "its scheme is none of redis, rediss, unix and sentinel",
    '"redis://127.0.0.1:6379/0"': "its scheme is none of",
    "http://hunter2@cache/0": "its scheme is none of",
    "redis+socket:///run/redis.sock": "its scheme is none of",
    "redis://cache/zero": "its database is no number",
    "redis://cache/-1": "its database is no number",
    "redis://cache/1/2": "its database is no number",
    "redis://cache/0?db=3": "it names two databases",
    "redis://cache/0;redis://other/0": "its database is no number",
    "redis://cache,other/0": r"it names several hosts\. .* sentinel://host1,host2/name/0",
    "redis://:hunter2#@cache/0": "it cannot be read",
    "redis://:hunt/er2@cache/0": "it cannot be read",
    "redis://:hunter2?=@cache/0": "it has an option that is unknown for redis://; known are db, username",
    "redis://:hunt[er2@cache/0": "it cannot be read",
    "redis://cache:0/0": "it cannot be read",
    "redis://cache:70000/0": "it cannot be read",
    "redis://ca che/0": "it cannot be read",
    "redis://cache/0?nonsense=1": "it has an option that is unknown for redis://",
    "redis://cache/0?decode_responses=false": "it has an option that is unknown for redis://",
    "redis://cache/0?protocol=4": "its option protocol is none: it wants a whole number from 2 to 3",
    "redis://cache/0?protocol=2&protocol=3": "it has its option protocol twice",
    "redis://cache/0?db=": "its option db is empty",
    "redis://cache/0?db": "it cannot be read",
    "redis://cache/0?socket_timeout=hunter2": "its option socket_timeout is none: it wants seconds",
    "redis://cache/0?socket_timeout=0": "its option socket_timeout is none",
    "redis://cache/0?socket_timeout=inf": "its option socket_timeout is none",
    "redis://cache/0?max_connections=1": "its option max_connections is none: it wants a whole number from 2",
    "redis://cache/0?ssl_ca_certs=/etc/ca.pem": r"its option ssl_ca_certs is for TLS, .* Write rediss://",
    "rediss://cache/0?ssl_cert_reqs=sometimes": "its option ssl_cert_reqs is none: it wants required, optional or none",
    "rediss://cache/0?ssl_ca_certs=/nowhere/ca.pem": "its option ssl_ca_certs names nothing that is there",
    "rediss://cache/0?ssl_ca_certs=/etc/hostname": "ssl_ca_certs names no file of certificates",
    "rediss://cache/0?ssl_certfile=/etc/hostname": "hold no certificate with its key",
    "rediss://cache/0?ssl_certfile={locked}": "or ssl_password does not open it",
    "rediss://cache/0?ssl_keyfile={locked}": "ssl_keyfile without ssl_certfile",
    "unix://run/redis.sock": r"names no socket by its whole path\. Write unix:///run/redis.sock",
    "unix:///run/redis.sock?ssl_cert_reqs=none": "it has an option that is unknown for unix://",
    "sentinel://host1,host2": r"the service that they watch\. Write sentinel://host1,host2/name/0",
    "sentinel://host1,,host2/group": "it does not name the Sentinels",
    "sentinel://host1;sentinel://host2/group": "Write sentinel://host1,host2/name/0",
    "sentinel://host1/group/0?ssl_ca_certs=/etc/ca.pem": r"is for TLS, .* Write ssl=true too",
    "sentinel://host1/group/0?ssl=perhaps": "its option ssl is none: it wants true or false",
}


@pytest.mark.holds("docs/operations.md#how-do-i-write-keye_redis_url", "What they do not know is refused")
@pytest.mark.parametrize("url", REFUSED)
def test_what_is_none_is_refused_by_both_sides_with_one_sentence_and_no_secret(url: str, authority: Authority) -> None:
    url, expected = url.replace("{locked}", str(authority.issue("locked", "open sesame"))), REFUSED[url]
    sentences = []
    for use in (
        lambda: Settings.read(redis_url=SecretStr(url)),
        lambda: ProducerSettings.read(redis_url=SecretStr(url)),
        lambda: Client(url),
        lambda: connect(url),
    ):
        with pytest.raises(InvalidSettings, match=f"KEYE_REDIS_URL: .*(?:{expected})") as refused:
            use()
        sentences.append(str(refused.value))
    assert len(set(sentences)) == 1
    assert not [secret for secret in ("hunter2", "hunt", "er2@") if secret in sentences[0]]


@pytest.mark.parametrize(
    ("module", "command", "code"),
    [("worker.daemon", "run", ExitCode.PREFLIGHT_FAILED), ("producer", "status", shell.ExitCode.INVALID)],
)
def test_commands_end_with_that_sentence(module: str, command: str, code: int, tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(PYTHONPATH), "KEYE_REDIS_URL": "redis://:hunter2@cache/0?nonsense=1"}
    program = [sys.executable, "-c", f"from keye.{module}.cli import app; app()", command]
    ran = subprocess.run(program, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr
    assert "KEYE_REDIS_URL: it has an option that is unknown for redis://" in " ".join(ran.stderr.split())
    assert "hunter2" not in ran.stderr + ran.stdout


@contextmanager
def listening(certificate: Path) -> Iterator[tuple[int, list[bytes]]]:
    """A port that speaks TLS, and what it is told once a client has accepted its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    told: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = door.accept()
                with context.wrap_socket(connection, server_side=True) as secured:
                    secured.settimeout(5)
                    told.append(secured.recv(4096))
            except ssl.SSLError:
                continue
            except OSError:
                if door.fileno() < 0:
                    return

    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield door.getsockname()[1], told
        door.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.mark.holds(
    "docs/operations.md#how-do-i-write-keye_redis_url",
    "With `rediss://` the server's certificate and its name are verified",
)
@pytest.mark.parametrize("options", ["", "?ssl_cert_reqs=required", "?ssl_ca_certs={ca}", "?ssl_cert_reqs=optional"])
def test_nobody_tells_an_unknown_server_the_password(options: str, authority: Authority, tmp_path: Path) -> None:
    """Known neither to this machine nor to `ssl_ca_certs`."""
    stranger = Authority(tmp_path / "stranger")
    with listening(stranger.issue("localhost")) as (port, told):
        refuse(f"rediss://:secret@localhost:{port}/0{options.format(ca=authority.path)}")
        assert told == []


def test_nor_one_whose_certificate_is_for_another_host(authority: Authority) -> None:
    with listening(authority.issue("elsewhere")) as (port, told):
        refuse(f"rediss://:secret@localhost:{port}/0?ssl_ca_certs={authority.path}")
        assert told == []


def refuse(url: str) -> None:
    """Our clients, Celery's broker and its results."""
    app = build_app(Settings.read(redis_url=SecretStr(url)))
    with connect(url) as ours, Client(url) as client:
        with pytest.raises(RedisError, match="CERTIFICATE_VERIFY_FAILED"):
            ours.ping()
        with pytest.raises(QueueUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            client.submit(prompt="?")
        with pytest.raises(RedisError, match="CERTIFICATE_VERIFY_FAILED"):
            app.backend.client.ping()
        with app.connection_for_read() as broker, pytest.raises(Exception, match="CERTIFICATE_VERIFY_FAILED"):
            broker.default_channel.client.ping()


def test_a_server_that_asks_for_a_certificate_is_shown_one(server: RedisServer, filled: Callable[[str], str]) -> None:
    server.redis.config_set("tls-auth-clients", "yes")
    try:
        refused, *_ = check_broker(filled(TLS + "?ssl_ca_certs={ca}"), 30, False)
        assert refused.severity is Severity.FAULT
        url = filled(TLS + "?ssl_ca_certs={ca}&ssl_certfile={client}")
        app = build_app(Settings.read(redis_url=SecretStr(url)))
        assert select([*check_broker(url, 30, False), *check_celery_connects(app)], Severity.FAULT) == []
    finally:
        server.redis.config_set("tls-auth-clients", "optional")


@pytest.mark.parametrize("url", ["rediss://localhost:{port}/0?ssl_cert_reqs=none", "redis://localhost:{tls}/0"])
def test_the_wrong_port_is_a_fault_of_the_broker(url: str, filled: Callable[[str], str]) -> None:
    (finding,) = check_broker(filled(url), 30, False)
    assert finding.severity is Severity.FAULT


def test_what_workers_tell_of_their_transport_holds_no_password(
    server: RedisServer, filled: Callable[[str], str], tmp_path: Path
) -> None:
    url = filled("redis://{user}:{password}@127.0.0.1:{port}/9")
    with connect(url) as redis:
        workers = EchoWorkers(url, redis, tmp_path, lease_seconds=30)
        try:
            workers.start_ready()
            app = build_app(Settings.read(redis_url=SecretStr(url)))
            (told,) = app.control.inspect(timeout=5).stats().values()
        finally:
            workers.end()
    assert told["broker"]["transport_options"]["redis_url"] == f"redis://127.0.0.1:{server.port}/9"
    assert SECRET not in json.dumps(told)


class TestSentinel:
    @pytest.fixture
    def guarded(self, authority: Authority, tmp_path: Path) -> Iterator[str]:
        """A URL of Sentinels and a server that have passwords, one each, and speak TLS only."""
        certificate, key = authority.issue("127.0.0.1"), authority.issue("127.0.0.1")
        tls = {"tls-cert-file": certificate, "tls-key-file": key, "tls-ca-cert-file": authority.path}
        tls |= {"tls-auth-clients": "no"}
        options = [each for name, value in tls.items() for each in (f"--{name}", value)]
        with RedisServer(tmp_path / "redis", *options, "--tls-replication", "yes") as server:
            server.redis.config_set("tls-port", server.tls_port)
            server.redis.config_set("masterauth", "master secret")
            server.redis.config_set("requirepass", "master secret")
            lines = [f"{name} {value}" for name, value in tls.items()]
            lines += ["tls-replication yes", "requirepass watchful", 'sentinel auth-pass group "master secret"']
            with Sentinels(tmp_path / "sentinels", server.tls_port, "group", lines, tls=True) as sentinels:
                yield (
                    f"sentinel://{sentinels.hosts}/group/0?ssl=true&ssl_ca_certs={authority.path}"
                    "&sentinel_password=watchful"
                )

    @pytest.mark.holds("docs/operations.md#how-do-i-write-keye_redis_url", "`sentinel://` takes these with `ssl=true`")
    def test_passwords_of_both_and_tls_to_both(
        self, guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KEYE_REDIS_URL", guarded)
        monkeypatch.setenv("KEYE_REDIS_PASSWORD", "master secret")
        settings = Settings.read()
        findings = [*check_broker(settings.full_redis_url(), 30, False), *check_celery_connects(build_app(settings))]
        assert select(findings, Severity.FAULT) == []
        with Client() as client:
            assert client.submit(prompt="?").state == "QUEUED"
        monkeypatch.setenv("KEYE_REDIS_URL", guarded.replace("watchful", "careless"))
        with Client() as client, pytest.raises(QueueUnavailable, match=r"no Sentinel tells where it is: .*password"):
            client.submit(prompt="?")

    def test_a_service_that_none_watches_is_told(self, sentinels: Sentinels) -> None:
        url = sentinels.url.replace("/group", "/other")
        with Client(url) as client, pytest.raises(QueueUnavailable, match="a Sentinel watches no service 'other'"):
            client.submit(prompt="?")

    def test_a_server_in_place_of_a_sentinel_is_told(self, server: RedisServer) -> None:
        url = f"sentinel://127.0.0.1:{server.port}/group/0"
        with Client(url) as client, pytest.raises(QueueUnavailable, match="no Sentinel tells where it is: unknown"):
            client.submit(prompt="?")

    def test_two_groups_of_one_name_keep_their_outcomes_apart(self) -> None:
        def folder(url: str) -> Path:
            with connect(url) as redis:
                return Spool.of(redis, Path("/spool")).folder

        assert folder("sentinel://a,b/group/0") == folder("sentinel://b,a:26379/group/0")
        assert folder("sentinel://a,b/group/0") != folder("sentinel://a,c/group/0")
