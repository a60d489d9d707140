"""The table of wilful differences holds nothing that no scenario shows."""

import fnmatch

import pytest

import test_gss
import test_gss_hostile
import test_gss_library
import test_gss_old_functions
import test_gss_tickets
import test_hostile
import test_old_functions
import test_openssl_guest
import test_oracle
import test_socket_options
import test_tls_options
from comparison import DIFFERENCES

MODULES = (test_gss, test_gss_hostile, test_gss_library, test_gss_old_functions, test_gss_tickets, test_hostile,
           test_old_functions, test_openssl_guest, test_oracle, test_socket_options, test_tls_options)
SCENARIO_IDS = [scenario.id for module in MODULES for scenario in module.SCENARIOS]


@pytest.mark.parametrize("difference", DIFFERENCES, ids=[difference.pattern for difference in DIFFERENCES])
def test_is_shown_by_a_scenario(difference):
    assert fnmatch.filter(SCENARIO_IDS, difference.pattern)


def test_scenario_ids_are_unique():
    assert len(SCENARIO_IDS) == len(set(SCENARIO_IDS))
