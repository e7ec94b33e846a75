"""Every test is in one tier: unit, distributed or slow."""

from tests.conftest import TIERS


def test_every_test_is_in_one_tier(request):
    tiers = request.config.stash[TIERS]
    assert request.node.nodeid in tiers
    assert {nodeid: found for nodeid, found in tiers.items() if len(found) != 1} == {}
