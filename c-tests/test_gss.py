"""A session that is encrypted with GSSAPI is refused, and no cancel connection at all is made for it.

The control is the same user with the same ticket over TLS: there the query is cancelled.
"""

from __future__ import annotations

import socket
import subprocess

import pytest

import peers
import wire
from hostile import SSL_REQUEST, Proxy, Run
from kerberos import Realm
from server import Postgres

# The monitor comes over the Unix socket; everybody else shows a ticket, and no session is in the clear.
HBA = """
local      all all trust
hostgssenc all all 127.0.0.1/32 gss include_realm=0
hostssl    all all 127.0.0.1/32 gss include_realm=0
"""
SESSION = "c-tests/test_gss.py"  # its application_name
HOW_PROTECTED = f"""
select gss_authenticated, gss.encrypted, ssl from pg_stat_activity
join pg_stat_gssapi gss using (pid) join pg_stat_ssl using (pid) where application_name = '{SESSION}'
"""
IN_WORDS = "pqcancel cannot cancel a session that is encrypted with GSSAPI, and will not do so in plaintext"
REFUSED = f'status=BAD socket=-1 error="{IN_WORDS}\\n"'
CREATE = f"PQcancelCreate -> object  {REFUSED}"
START = f"PQcancelStart -> 0  {REFUSED}"
POLL = f"PQcancelPoll -> FAILED  {REFUSED}"
BLOCKING = f"PQcancelBlocking -> 0  {REFUSED}"
# As in libpq, an object that was BAD from the beginning is no better after PQcancelReset, though its message is gone.
RESET = ['PQcancelReset -> void  status=ALLOCATED socket=-1 error=""',
         'PQcancelBlocking -> 0  status=BAD socket=-1 error=""']
# What each scenario of the driver comes to, call by call.
CALLS = {
    "blocking": [CREATE, BLOCKING],
    "polled": [CREATE, START],
    "start-twice": [CREATE, START, POLL, *RESET],
    "poll-before-start": [CREATE, POLL, START, *RESET],
}


@pytest.fixture(scope="module")
def realm():
    with Realm() as running:
        yield running


@pytest.fixture(scope="module")
def proxy(realm, certs):
    with Postgres(peers.postgres_system(), certs, settings={"krb_server_keyfile": str(realm.keytab)}, hba=HBA,
                  environment=realm.server_environment) as server, Proxy(server, "tcp4") as proxy:
        yield proxy


def monitor(server):
    return server.conninfo(host=server.socket_dir)


def how_protected(server):
    """What the server knows of the session: authenticated with GSSAPI, encrypted with it, encrypted with TLS."""
    command = ["psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--command", HOW_PROTECTED,
               monitor(server)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def connect_after_the_driver(proxy):
    """The proxy accepts in order: once this connection is served, every earlier one has been recorded too."""
    with socket.create_connection((proxy.host, proxy.port), timeout=15) as sock:
        sock.sendall(SSL_REQUEST)
        assert sock.recv(1) == b"S"


def run(laboratory, realm, proxy, home, gssencmode, scenario):
    """Returns the driver's transcript, how the server protected the session, and what the cancel connections sent."""
    session = proxy.server.conninfo(host="localhost", hostaddr=proxy.host, port=proxy.port, gssencmode=gssencmode,
                                    sslmode="verify-full", sslrootcert=laboratory.certs.ca, application_name=SESSION)
    protection: list[str] = []
    with Run(proxy) as record:
        environment = {
            "HOME": str(home),
            "LC_ALL": "C",
            "LD_LIBRARY_PATH": ":".join(map(str, laboratory.libraries("system"))),
            "DRIVER_CONTROL_FD": str(record.driver_control.fileno()),
            "DRIVER_GATES": "session",
            "DRIVER_MONITOR": monitor(proxy.server),
            **realm.environment,
        }
        with subprocess.Popen([laboratory.build / "driver-pqcancel", session, scenario], env=environment, text=True,
                              pass_fds=[record.driver_control.fileno()], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE) as driver:
            try:
                record.driver_control.close()
                record.at_gate("session", lambda: protection.append(how_protected(proxy.server)))
                transcript, _ = driver.communicate(timeout=70)
            finally:
                driver.kill()
        connect_after_the_driver(proxy)
    sent = [wire.summary(connection) for connection in sorted(record.cancels, key=lambda c: c.number)]
    assert sent.pop() == "SSLRequest"  # the one after the driver's
    return f"{transcript}exit status {driver.returncode}\n", protection, sent


@pytest.mark.parametrize("scenario", CALLS)
def test_session_encrypted_with_gssapi_is_refused(laboratory, realm, proxy, tmp_path, scenario):
    transcript, protection, sent = run(laboratory, realm, proxy, tmp_path, "require", scenario)
    assert protection == ["t|t|f"], transcript
    assert sent == [], transcript
    assert transcript.splitlines() == ["session: ssl=0", *CALLS[scenario], "PQcancelFinish", "exit status 0"]


OLD_FUNCTIONS = {
    "cancel": ["PQgetCancel -> a PGcancel", f'PQcancel -> 0 errno kept, errbuf "PQcancel() -- {IN_WORDS}\\n"'],
    "request": [f'PQrequestCancel -> 0 errno kept, errbuf "PQcancel() -- {IN_WORDS}\\n"'],
}


@pytest.mark.parametrize("scenario", OLD_FUNCTIONS)
def test_the_old_functions_refuse_it_too(old, realm, proxy, tmp_path, scenario):
    transcript, protection, sent = run(old, realm, proxy, tmp_path, "require", scenario)
    assert protection == ["t|t|f"], transcript
    assert sent == [], transcript
    assert transcript.splitlines()[1:1 + len(OLD_FUNCTIONS[scenario])] == OLD_FUNCTIONS[scenario], transcript


def test_same_session_over_tls_is_cancelled(laboratory, realm, proxy, tmp_path):
    transcript, protection, sent = run(laboratory, realm, proxy, tmp_path, "disable", "query")
    assert protection == ["t|f|t"], transcript
    assert transcript.startswith("session: ssl=1\n"), transcript
    assert transcript.endswith("result: SQLSTATE 57014\nnext query: 42\nexit status 0\n"), transcript
    assert len(sent) == 1 and sent[0].startswith("SSLRequest, ClientHello("), sent
