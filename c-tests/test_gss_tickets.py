"""Tickets that are gone, or no good any more, when a session that is encrypted with GSSAPI is to be cancelled: the cancel fails
with libpq 18's words, and goes by no other way. And tickets that are had in other ways."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import pytest

from comparison import Scenario, cases, compare
from kerberos import Realm

FILE = "tickets"
CACHE = {"KRB5CCNAME": "FILE:{dir}/" + FILE}
NO_CACHE = "GSSAPI encryption required but no credential cache"
NO_CONTEXT = "could not initiate GSSAPI security context: Unspecified GSS failure.  Minor code may provide more information: "
SEALED = "GSSENCRequest, token, packet of 76 bytes"


@dataclass
class Tickets:
    """A realm, and what may come in the place of a user's tickets."""

    realm: Realm
    expired: Path
    for_tickets: Path  # none for a service: that must be fetched


@pytest.fixture(scope="module")
def tickets(realm, expired_tickets, tmp_path_factory):
    made = Tickets(realm, expired_tickets, tmp_path_factory.mktemp("tickets") / "good")
    realm.kinit(made.for_tickets)
    return made


def removed(_tickets: Tickets, cache: Path) -> None:
    cache.unlink()


def destroyed(tickets: Tickets, cache: Path) -> None:
    tickets.realm.kdestroy(cache)


def garbage(_tickets: Tickets, cache: Path) -> None:
    cache.write_bytes(bytes(100))


def expired(tickets: Tickets, cache: Path) -> None:
    shutil.copy(tickets.expired, cache)


def kdc_gone(tickets: Tickets, cache: Path) -> None:
    shutil.copy(tickets.for_tickets, cache)
    tickets.realm.stop()


def service_unknown(tickets: Tickets, cache: Path) -> None:
    shutil.copy(tickets.for_tickets, cache)
    tickets.realm.rename(Realm.service, "renamed")


@dataclass(frozen=True)
class Loss:
    """What happens between the session and the cancel, what libpq 18 says then, and how all is well again."""

    happens: Callable[[Tickets, Path], None]
    says: str
    ends: Callable[[Realm], None] = lambda _: None


LOSSES = {
    "removed": Loss(removed, NO_CACHE),
    "destroyed": Loss(destroyed, NO_CACHE),
    "garbage": Loss(garbage, NO_CACHE),
    "expired": Loss(expired, f"{NO_CONTEXT}Ticket expired"),
    "kdc-gone": Loss(kdc_gone, f"{NO_CONTEXT}Cannot contact any KDC for realm 'PQCANCEL.TEST'", lambda realm: realm.start()),
    "service-unknown": Loss(service_unknown, f"{NO_CONTEXT}Server postgres/localhost@PQCANCEL.TEST not found",
                            lambda realm: realm.rename("renamed", Realm.service)),
}
SCENARIOS = [Scenario(name, "gss", run, environment=CACHE, shows=loss.says, only_host="system" if run == "blocking" else "")
             for name, loss in LOSSES.items() for run in ("polled", "blocking")]
# With gssencmode=prefer libpq 18 takes TLS instead, or no encryption at all: a wilful difference.
SCENARIOS += [Scenario(f"{name}-as-preferred-{sslmode}", "gss", environment=CACHE, shows=other_way, only_host="system",
                       options={"gssencmode": "prefer", "sslmode": sslmode})
              for name in LOSSES for sslmode, other_way in (("disable", "CancelRequest of 16 bytes in the clear"),
                                                            ("prefer", "SSLRequest, ClientHello("))]


@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(gss, tickets, tmp_path, scenario, host):
    """Both runs begin with good tickets and lose them."""
    loss = LOSSES[scenario.name.partition("-as-preferred-")[0]]
    lost: list[Loss] = []

    def lose(directory: Path, *_) -> None:
        lost.append(loss)
        loss.happens(tickets, directory / FILE)

    def restore() -> None:
        if lost:
            lost.pop().ends(tickets.realm)

    def prepare(directory: Path, *_) -> None:
        restore()
        tickets.realm.kinit(directory / FILE)
    try:
        compare(gss, replace(scenario, prepare=prepare, at_session=lose), tmp_path / "home", host)
    finally:
        restore()


@pytest.mark.parametrize("host", ["system", "18"])
def test_a_ticket_for_the_service_is_enough(gss, realm, tmp_path, host):
    """The session has fetched it. That the KDC is gone does not matter until it expires."""
    def prepare(directory: Path, *_) -> None:
        realm.start()
        realm.kinit(directory / FILE)
    scenario = Scenario("tickets-of-the-session", "gss", environment=CACHE, prepare=prepare, shows=SEALED,
                        at_session=lambda *_: realm.stop())
    try:
        compare(gss, scenario, tmp_path / "home", host)
    finally:
        realm.start()


@pytest.mark.parametrize("host", ["system", "17", "18"])
@pytest.mark.parametrize("cache", ["MEMORY:", "FILE:{dir}/tickets"])
def test_tickets_that_the_library_fetches_by_itself(gss, realm, tmp_path, cache, host):
    """With a keytab of the client's, as services have it; into a cache that only this process knows, or that is gone again."""
    scenario = Scenario("client-keytab", "gss", "cycles", 3, shows=SEALED, environment={
        "KRB5CCNAME": cache, "KRB5_CLIENT_KTNAME": str(realm.user_keytab)},
        at_session=lambda directory, *_: (directory / FILE).unlink(missing_ok=True))
    compare(gss, scenario, tmp_path / "home", host)
