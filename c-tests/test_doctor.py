"""`pqcancel doctor`: what it finds is what is there, by the witness of servers and of eavesdroppers on the way to them."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
from contextlib import ExitStack, contextmanager

import pytest

import peers
from doctor import FAILED, GOOD, REFUSED, WEAK, Doctor
from eavesdropper import Cancels, Eavesdropper
from hostile import CancelConnection, Proxy, Run, Script
from key_server import KeyServer
from monitor import SLEEPING, Monitor
from preloaded import BIN, DROPIN
from scripts import expect_ssl_request, tls_context
from server import Postgres, conninfo
from wire import CANCEL_REQUEST_CODE

MANUAL = peers.ROOT / "man" / "pqcancel.1"
SECRET = "correct horse"
HBA = """
local all all trust
host  all keeper all scram-sha-256
host  all all    all trust
"""
STEPS = ["PQcancelCreate", "connected", "TLS established", "request sent", "server closed"]
CANCELLED = "ERROR:  canceling statement due to user request"
TLS13 = {"readable": False, "encryption": "TLSv1.3", "bytes": 16 + 17}  # what TLS 1.3 adds to what it encrypts
SLEEPS = 30  # seconds: the doctor's queries
SOON = 9  # seconds: less than its cancels may take


@pytest.fixture(scope="module")
def doctor():
    with Doctor() as made:
        yield made


@pytest.fixture(scope="module")
def plain(certs):
    """A server without TLS, on every address of this machine. One of its users has a password."""
    with Postgres(peers.postgres_system(), certs, hba=HBA, settings={"ssl": "off", "listen_addresses": "*"}) as running:
        with Monitor(running) as psql:
            psql.ask(f"create role keeper login password '{SECRET}'")
        yield running


# Sessions that are fine.

@pytest.mark.parametrize("version", ["15", "18"])
def test_a_verified_session_is_good(doctor, servers, certs, version):
    with Eavesdropper(servers[version], certs) as overheard:
        found = doctor.examine(overheard.conninfo())
        assert (found.status, found.stderr, found.advice) == (GOOD, "", {})
        assert overheard.cancels == Cancels(readable=0, encrypted=4), "two a run, and libpq's own has not left the machine"
    assert found.facts["server"]["version"].split(".")[0] == version
    assert found.facts["server"]["host"] == "localhost" and found.facts["server"]["address"] == overheard.place["hostaddr"]
    session = found.session
    assert (session["encryption"], session["protocol"], session["sslmode"]) == ("TLS", "TLSv1.3", "verify-full")
    assert (session["certificate"], session["roots"]) == ("verified, with its host name", str(certs.ca))
    assert found.facts["pqcancel"]["library"] == str(doctor.library)
    assert_both_cancelled(found.cancels, TLS13)


def assert_both_cancelled(cancels: dict, wire: dict | None, steps: list[str] = STEPS) -> None:
    for name, expected in (("PQcancelPoll", steps), ("PQcancel", ["PQcancel"])):
        cancel = cancels[name]
        assert (cancel["query"], cancel["sqlstate"], cancel["message"]) == ("cancelled", "57014", CANCELLED)
        assert cancel["wire"] == wire
        assert [step["step"] for step in cancel["steps"]] == expected
        times = [step["ms"] for step in cancel["steps"]]
        assert times == sorted(times) and 0 < cancel["ms"] < SLEEPS * 1e3


def test_the_page_shows_both_requests_as_an_eavesdropper_reads_them(doctor, servers, certs):
    with Eavesdropper(servers["15"], certs) as overheard:
        page = doctor.run(overheard.conninfo()).stdout
        sent = [connection.sent_by_client for connection in overheard.connections]
    rows = [line.split(" | ") for line in page.splitlines() if " | " in line]
    left, right = zip(*[(row[0].strip(), row[1]) for row in rows])
    assert left[1:3] == ("00 00 00 10  length 16", "04 d2 16 2e  CancelRequest")
    assert left[3].endswith("<== readable") and left[4].startswith("xx xx xx xx  cancel key")
    assert right[1].startswith("17 03 03 00 21 ")
    shown = bytes.fromhex("".join(row[:24] for row in right[1:]))
    assert len(shown) == 5 + 33 and any(shown in bytes_sent for bytes_sent in sent), "these very bytes have gone by"


def test_a_unix_socket_is_good_and_nobody_can_watch_it(doctor, servers):
    server = servers["15"]
    found = doctor.examine(conninfo(host=server.socket_dir, port=server.port, user=server.superuser, dbname="postgres"))
    assert (found.status, found.stderr, found.advice) == (GOOD, "", {})
    assert found.session["transport"] == "Unix socket" and "Unix socket" in found.facts["unwatched"]
    assert found.cancels["libpq"] is None
    assert_both_cancelled(found.cancels, None, [step for step in STEPS if step != "TLS established"])


@pytest.fixture
def closed():
    """A port at which nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("way", ["conninfo", "uri", "environment", "service", "database", "hosts"])
def test_a_session_is_found_as_libpq_finds_it(doctor, servers, certs, closed, way):
    server = servers["15"]
    service = doctor.home / "services"
    service.write_text(f"[here]\nhost=localhost\nport={server.port}\nuser=postgres\ndbname=postgres\n")
    tls = {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": certs.ca}
    place = {"PGHOST": "localhost", "PGPORT": server.port, "PGUSER": "postgres"}
    arguments, environment = {
        "conninfo": ([server.conninfo(host="localhost")], tls),
        "uri": ([f"postgresql://postgres@localhost:{server.port}/postgres"], tls),
        "environment": ([], {**place, **tls}),
        "service": (["service=here"], {"PGSERVICEFILE": service, **tls}),
        "database": (["postgres"], {**place, **tls}),
        "hosts": ([f"host={server.host},localhost port={closed},{server.port} user=postgres"], tls),
    }[way]
    found = doctor.examine(*arguments, **environment)
    assert (found.status, found.stderr) == (GOOD, "")
    assert (found.facts["server"]["host"], found.facts["server"]["port"]) == ("localhost", str(server.port))
    assert_both_cancelled(found.cancels, TLS13)


TLS12 = {"readable": False, "encryption": "TLSv1.2", "bytes": 16 + 8 + 16}  # the nonce's explicit part, and the tag


@pytest.mark.parametrize("options,wire", [({"host": "::1"}, TLS13), ({"sslnegotiation": "direct"}, TLS13),
                                          ({"ssl_max_protocol_version": "TLSv1.2"}, TLS12)])
def test_every_way_to_tls_is_read(doctor, servers, certs, options, wire):
    server = servers["18"]
    if options.get("host") == "::1" and not server.ipv6:
        pytest.skip("this machine has no IPv6")
    verified = {"host": "localhost", "sslmode": "verify-full", "sslrootcert": certs.ca}
    found = doctor.examine(server.conninfo(**{**verified, **options}), PQCANCEL_LIBPQ=peers.libpq18() / "libpq.so.5")
    assert (found.status, found.stderr, found.session["protocol"]) == (GOOD, "", wire["encryption"])
    assert_both_cancelled(found.cancels, wire)


# Sessions that are weak.

@pytest.mark.parametrize("options,status,certificate,weight", [
    ({"sslmode": "require", "sslrootcert": None}, WEAK, "not verified", "weak"),
    ({"sslmode": "prefer", "sslrootcert": None}, WEAK, "not verified", "weak"),
    ({"sslmode": "require"}, GOOD, "verified, but not its host name", "remark"),  # libpq: as verify-ca
    ({"sslmode": "verify-ca"}, GOOD, "verified, but not its host name", "remark"),
])
def test_a_certificate_is_as_good_as_its_verification(doctor, servers, certs, options, status, certificate, weight):
    with Eavesdropper(servers["15"], certs) as overheard:
        found = doctor.examine(overheard.conninfo(**options))
        assert overheard.cancels == Cancels(readable=0, encrypted=4)
    assert (found.status, found.stderr, found.session["certificate"]) == (status, "", certificate)
    assert list(found.advice) == [weight] and "sslmode=verify-full" in found.advice[weight]
    assert_both_cancelled(found.cancels, TLS13)


def test_roots_in_the_home_directory_are_found(doctor, servers, certs):
    place = doctor.home / ".postgresql"
    place.mkdir()
    try:
        shutil.copy(certs.ca, place / "root.crt")
        found = doctor.examine(servers["15"].conninfo(sslmode="require"))
    finally:
        shutil.rmtree(place)
    assert (found.status, found.session["roots"]) == (GOOD, str(place / "root.crt"))


def address_of_this_machine() -> str:
    """One that is not a loopback address: the one it would send from. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            pytest.skip(f"this machine has no other address than the loopback one: {error}")
        return probe.getsockname()[0]


def test_plaintext_is_weak_where_it_leaves_the_loopback_address(doctor, plain):
    steps = [step for step in STEPS if step != "TLS established"]
    for host, status, weight in ((plain.host, GOOD, "remark"), (address_of_this_machine(), WEAK, "weak")):
        found = doctor.examine(plain.conninfo(host=host, sslmode="prefer"))
        assert (found.status, found.stderr, list(found.advice)) == (status, "", [weight])
        assert found.session["encryption"] is None and found.session["tls_is_offered"] is False
        assert "The server offers no TLS" in found.advice[weight]
        readable = found.cancels["libpq"]["wire"]
        assert readable["readable"] and readable["key_bytes"] == 4
        assert_both_cancelled(found.cancels, readable, steps)


def test_tls_that_is_offered_is_recommended(doctor, servers, certs):
    with Eavesdropper(servers["15"], certs) as overheard:
        found = doctor.examine(overheard.conninfo(sslmode="disable"))
        assert overheard.cancels == Cancels(readable=4, encrypted=0)
    assert (found.status, found.session["tls_is_offered"]) == (GOOD, True)
    assert "The server offers TLS: use sslmode=verify-full." in found.advice["remark"]


def test_the_old_functions_in_plaintext_are_weak_and_stopped(doctor, servers, certs):
    with Eavesdropper(servers["15"], certs) as overheard:
        found = doctor.examine(overheard.conninfo(), PQCANCEL_LEGACY="plaintext")
        assert overheard.cancels == Cancels(readable=0, encrypted=2), "what would be readable has not left the machine"
    assert (found.status, found.cancels["PQcancel"]["wire"]["readable"]) == (WEAK, True)
    assert "PQCANCEL_LEGACY" in found.advice["weak"]


# No session, or no cancel.

def test_no_server(doctor, closed):
    found = doctor.examine(f"host=127.0.0.1 port={closed}")
    assert found.status == FAILED
    assert found.stderr.startswith(f'pqcancel doctor: connection to server at "127.0.0.1", port {closed} failed: ')
    assert "Connection refused" in found.facts["error"] and "session" not in found.facts


def test_a_server_that_sends_no_key(doctor, certs):
    with KeyServer(tls_context(certs, certs.server)) as server:
        found = doctor.examine(conninfo(host="localhost", hostaddr=server.host, port=server.port, user="postgres",
                                        dbname="none", sslmode="verify-full", sslrootcert=certs.ca))
        assert server.requests == []
    assert found.status == FAILED and "no cancel key" in found.advice["failed"]
    assert found.cancels["PQcancelPoll"]["message"] == "no cancellation key received"
    assert found.cancels["PQcancelPoll"]["query"] == "not cancelled" and found.cancels["PQcancel"] is None


@contextmanager
def pooler(server: Postgres, certs, on_cancel: Script):
    """One that ends TLS and speaks plaintext to the server, as poolers do. What it does with cancels is another matter.
    Yields a conninfo and the name of its sessions."""
    context = tls_context(certs, certs.server)

    def script(connection: CancelConnection) -> None:
        expect_ssl_request(connection)
        connection.send(b"S")
        connection.sock = context.wrap_socket(connection.sock, server_side=True)
        first = connection.receive_packet()
        if first[4:8] == CANCEL_REQUEST_CODE:
            on_cancel(connection)
            return
        with connection.run.proxy.connect_upstream() as upstream:
            upstream.sendall(first)
            pass_both_ways(connection.sock, upstream)

    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(server, "tcp4"))
        stack.enter_context(Run(proxy, script, sessions=0))
        name = f"pooled-at-{proxy.port}"
        yield server.conninfo(host="localhost", hostaddr=proxy.host, port=proxy.port, sslmode="verify-full",
                              sslrootcert=certs.ca, application_name=name), name


def pass_both_ways(client: socket.socket, upstream: socket.socket) -> None:
    other = {client: upstream, upstream: client}
    while True:
        for source in select.select(list(other), [], [])[0]:
            data = source.recv(65536)
            if not data:
                client.close()
                return
            other[source].sendall(data)


def test_a_pooler_that_drops_cancels_in_tls(doctor, servers, certs, monitor):
    """And the query is ended by other means."""
    with pooler(servers["15"], certs, CancelConnection.close) as (through_it, name):
        result = doctor.run(through_it)
        monitor.wait_for(0, name, SLEEPING, SOON)
    assert (result.returncode, result.stderr) == (FAILED, "")
    page = " ".join(result.stdout.split())
    assert "the query went on" in page and "drops cancels inside TLS" in page and "sleeps on" not in page
    assert result.stdout.count("request sent") == 1, "the second way is not tried"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_its_query(doctor, servers, certs, monitor, number):
    with pooler(servers["15"], certs, CancelConnection.hold) as (through_it, name):
        process = subprocess.Popen(doctor.words(through_it), env=doctor.environment(), stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        try:
            monitor.wait_for(1, name, SLEEPING)
            process.send_signal(number)
            output = process.communicate(timeout=SOON)
        finally:
            process.kill()
            process.wait()
        monitor.wait_for(0, name, SLEEPING, SOON)
    assert (process.returncode, output) == (-number, ("", ""))


@pytest.fixture
def lonely(monitor):
    """A user who may have a single session."""
    monitor.ask("create role lonely login connection limit 1")
    yield "lonely"
    monitor.ask("drop role lonely")


def test_a_second_session_is_not_needed(doctor, servers, certs, lonely):
    """The only one is examined, without an eavesdropper of the doctor's own."""
    with Eavesdropper(servers["15"], certs) as overheard:
        result = doctor.run("--json", overheard.conninfo(user=lonely))
        assert overheard.cancels == Cancels(readable=0, encrypted=2)
    facts = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (GOOD, "")
    assert facts["unwatched"] == 'a second session failed: FATAL:  too many connections for role "lonely"'
    assert_both_cancelled(facts["cancels"], None)


def test_unwatched_nothing_is_sent_that_would_be_readable(doctor, servers, certs, lonely):
    with Eavesdropper(servers["15"], certs) as overheard:
        result = doctor.run(overheard.conninfo(user=lonely), environment={"PQCANCEL_LEGACY": "plaintext"})
        assert overheard.cancels == Cancels(readable=0, encrypted=1)
    assert (result.returncode, result.stderr) == (WEAK, "") and "PQCANCEL_LEGACY" in result.stdout


# No secret is printed.

def passwords(doctor: Doctor, server: Postgres) -> dict[str, tuple[list[str], dict]]:
    """Every way to tell libpq a password."""
    passfile = doctor.home / "passwords"
    passfile.write_text(f"{server.host}:{server.port}:*:keeper:{SECRET}\n")
    passfile.chmod(0o600)
    keeper = server.conninfo(user="keeper")
    return {
        "environment": ([keeper], {"PGPASSWORD": SECRET}),
        "conninfo": ([server.conninfo(user="keeper", password=SECRET)], {}),
        "uri": ([f"postgresql://keeper:{SECRET.replace(' ', '%20')}@{server.host}:{server.port}/postgres"], {}),
        "passfile": ([keeper], {"PGPASSFILE": passfile}),
    }


@pytest.mark.parametrize("way", ["environment", "conninfo", "uri", "passfile"])
def test_a_password_is_used_and_not_shown(doctor, plain, way):
    arguments, environment = passwords(doctor, plain)[way]
    found = doctor.examine(*arguments, **environment)
    assert (found.status, found.stderr, found.facts["unwatched"]) == (GOOD, "", None)
    assert SECRET not in found.output and SECRET.replace(" ", "%20") not in found.output


def test_nor_is_a_wrong_or_a_missing_one(doctor, plain):
    wrong = doctor.examine(plain.conninfo(user="keeper", password=f"not {SECRET}"))
    assert wrong.status == FAILED and 'password authentication failed for user "keeper"' in wrong.stderr
    assert SECRET not in wrong.output
    missing = doctor.examine(plain.conninfo(user="keeper"))
    assert missing.status == FAILED and "no password supplied" in missing.stderr


@pytest.mark.parametrize("broken", ["user=keeper password=correct horse host=h", "password='correct horse",
                                    "postgresql://keeper:correct horse@[::1", "postgresql://keeper:correct horse%00@h/"])
def test_nor_is_one_that_libpq_quotes(doctor, broken):
    found = doctor.examine(broken)
    assert found.status == FAILED and found.stderr.startswith("pqcancel doctor: ")
    assert not any(word in found.output for word in ("correct", "horse"))


def test_there_libpq_would_have_shown_it():
    """Control experiment."""
    broken = "postgresql://keeper:correct horse@[::1"
    psql = subprocess.run([BIN / "psql", "--no-psqlrc", broken], capture_output=True, text=True)
    assert "correct horse" in psql.stderr


@pytest.mark.parametrize("arguments", [["--password=correct horse"], ["dbname=a", "password=correct horse"], ["--jsonl"],
                                       ["--libpq="], ["--libpq=/no/such/libpq.so.5"]])
def test_a_wrong_command_line_is_refused_without_its_words(doctor, arguments):
    result = doctor.run(*arguments)
    assert (result.returncode, result.stdout) == (REFUSED, "")
    assert result.stderr.startswith("pqcancel: ") and result.stderr.count("\n") == 1
    assert "horse" not in result.stderr


def test_no_cancel_key_is_shown(doctor, servers, certs):
    for sslmode, readable in (("disable", 4), ("verify-full", 0)):
        with Eavesdropper(servers["15"], certs) as overheard:
            output = doctor.examine(overheard.conninfo(sslmode=sslmode)).output
            requests = [connection.sent_by_client for connection in overheard.readable]
        assert len(requests) == readable
        for request in requests:
            pid, key = request[8:12], request[12:]
            assert pid.hex(" ") in output or str(int.from_bytes(pid, "big")) in output
            assert not any(text in output for text in (key.hex(), key.hex(" "), str(int.from_bytes(key, "big"))))


# Whatever the machine is like.

@pytest.mark.parametrize("how", ["option", "environment"])
def test_another_libpq(doctor, servers, certs, how):
    libpq = peers.libpq18() / "libpq.so.5"
    options = [f"--libpq={libpq}"] if how == "option" else []
    environment = {} if how == "option" else {"PQCANCEL_LIBPQ": libpq}
    with Eavesdropper(servers["18"], certs) as overheard:
        found = doctor.examine(*options, overheard.conninfo(min_protocol_version="3.2"), **environment)
        assert overheard.readable == []
    assert (found.status, found.stderr) == (GOOD, "")
    assert found.facts["libpq"] == {"version": "18.6", "library": str(libpq.resolve())}
    assert found.cancels["libpq"]["wire"]["key_bytes"] == 32, "protocol 3.2"
    assert_both_cancelled(found.cancels, {**TLS13, "bytes": 12 + 32 + 17})


@pytest.mark.parametrize("version", [10, 12, 14])
def test_older_libpqs(doctor, servers, certs, version):
    libpq = peers.postgres(version) / "lib" / "libpq.so.5"
    found = doctor.examine(f"--libpq={libpq}", servers["15"].conninfo(host="localhost", sslmode="verify-full",
                                                                     sslrootcert=certs.ca), LD_LIBRARY_PATH=libpq.parent)
    assert (found.status, found.stderr) == (GOOD, "")
    assert found.facts["libpq"]["version"].split(".")[0] == str(version)
    assert_both_cancelled(found.cancels, TLS13)


@pytest.mark.parametrize("variables", [["LD_PRELOAD"], ["LD_LIBRARY_PATH"], ["LD_PRELOAD", "LD_LIBRARY_PATH"]],
                         ids=["preloaded", "drop-in", "both"])
def test_libpqs_own_function_is_told_from_pqcancels(doctor, servers, certs, variables):
    """Also where pqcancel stands in front of libpq."""
    in_front = {"LD_PRELOAD": doctor.library, "LD_LIBRARY_PATH": DROPIN}
    environment = {name: in_front[name] for name in variables}
    with Eavesdropper(servers["15"], certs) as overheard:
        found = doctor.examine(overheard.conninfo(), **environment)
        assert overheard.cancels == Cancels(readable=0, encrypted=4)
    assert (found.status, found.cancels["libpq"]["wire"]["readable"]) == (GOOD, True)
    assert found.facts["libpq"]["library"] == str((DROPIN / "libpq-host.so.5").resolve())
    assert_both_cancelled(found.cancels, TLS13)


def test_no_socket_takes_the_place_of_a_closed_descriptor(doctor, servers):
    """The trace would go into the session."""
    server = servers["15"]
    session = conninfo(host=server.socket_dir, port=server.port, user=server.superuser, dbname="postgres")
    result = doctor.run(session, environment={"PQCANCEL_TRACE": "stderr"}, preexec_fn=lambda: os.close(2))
    assert result.returncode == GOOD
    assert "CONNECTION_OK" in doctor.run(session, environment={"PQCANCEL_TRACE": "stderr"}).stderr, "there is a trace"


def test_a_full_standard_output_is_a_failure(doctor, servers):
    with open("/dev/full", "w") as full:
        result = subprocess.run(doctor.words(servers["15"].conninfo()), env=doctor.environment(), stdout=full,
                                stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (REFUSED, "pqcancel: stdout: No space left on device\n")


def test_help_tells_all_options_and_statuses(doctor):
    text = doctor.run("--help").stdout
    assert all(word in text for word in ("--json", "--libpq=FILE", "PQCANCEL_LIBPQ", "Exit status: 0", "125 if"))
    usage = subprocess.run([doctor.command, "--help"], capture_output=True, text=True).stdout
    assert text.splitlines()[0].removeprefix("usage: ") in usage
    manual = MANUAL.read_text()
    assert all(word in manual for word in ("doctor", "Fl -json", "Fl -libpq", "PQCANCEL_LIBPQ"))


def test_a_program_of_that_name_can_still_be_run(doctor):
    program = doctor.home / "bin" / "doctor"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho my own\n")
    program.chmod(0o755)
    result = subprocess.run([doctor.command, "--", "doctor"], env=doctor.environment(PATH=f"{program.parent}:{os.defpath}"),
                            capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("my own\n", "")
