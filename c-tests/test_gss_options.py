"""Options of sessions that are encrypted with GSSAPI, as a server sees them that the client accepts; over libpq 18 and over
pqcancel."""

from __future__ import annotations

from dataclasses import replace

import pytest

import gss_scripts
from comparison import Scenario, compare

# What differs from a plain conninfo, and which service the client then asks for a ticket to.
SERVICES = {
    "nothing": ({}, {}, "postgres/localhost"),
    "krbsrvname": ({"krbsrvname": "other"}, {}, "other/localhost"),
    "PGKRBSRVNAME": ({}, {"PGKRBSRVNAME": "other"}, "other/localhost"),
    "hostaddr-only": ({"host": None}, {}, "postgres/127.0.0.1"),
    "host-is-address": ({"host": "127.0.0.1", "hostaddr": None}, {}, "postgres/127.0.0.1"),
    "host-to-be-resolved": ({"hostaddr": None}, {}, "postgres/localhost"),
    "second-of-two": ({"host": "nowhere,localhost", "hostaddr": "127.0.0.2,127.0.0.1"}, {}, "postgres/localhost"),
    "gsslib": ({"gsslib": "gssapi"}, {}, "postgres/localhost"),
}


def compare_seen(gss, scenario: Scenario, directory, host: str) -> list[gss_scripts.Facts]:
    """Returns what a server of ours sees of the client, over libpq 18 and over pqcancel."""
    facts: list[gss_scripts.Facts] = []
    compare(gss, replace(scenario, script=lambda _: gss_scripts.take_request(facts)), directory, host)
    return facts


@pytest.mark.usefixtures("acceptor")
@pytest.mark.parametrize("host", ["system", "17", "18"])
@pytest.mark.parametrize("name", SERVICES)
def test_the_service_is_the_sessions(gss, realm, tmp_path, name, host):
    options, environment, service = SERVICES[name]
    scenario = Scenario(f"service-{name}", "gss", options=options, environment=environment, shows="-> OK  status=OK")
    seen = compare_seen(gss, scenario, tmp_path / "home", host)
    assert [facts.target for facts in seen] == 2 * [f"{service}@{realm.name}"]


@pytest.mark.usefixtures("acceptor")
@pytest.mark.parametrize("value,delegated", [("1", True), ("0", False), (None, False)])
@pytest.mark.parametrize("host", ["17", "18"])
def test_gssdelegation(gss, tmp_path, value, delegated, host):
    """A wilful difference: with gssdelegation=1 libpq 18 hands over the user's tickets, too, although nobody has any use for
    them there. (Debian's libpq does not know the option.)"""
    scenario = Scenario("delegation", "gss", options={"gssdelegation": value}, shows="-> OK  status=OK")
    theirs, ours = compare_seen(gss, scenario, tmp_path / "home", host)
    assert (theirs.delegated, ours.delegated) == (delegated, False)
