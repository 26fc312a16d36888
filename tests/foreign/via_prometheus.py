"""`PAGE NODE SETS DEAD`: the page of `kv54 status --metrics` as Prometheus understands it."""

import sys

from prometheus_client.parser import text_string_to_metric_families

SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}


def main(page, node, sets, dead):
    with open(page, encoding="utf-8") as text:
        families = {family.name: family for family in text_string_to_metric_families(text.read())}
    for family in families.values():
        assert family.type in SUFFIXES and family.documentation, family
        for sample in family.samples:
            assert sample.name.removeprefix(family.name) in SUFFIXES[family.type], sample
            assert sample.labels["node"], sample
    samples = [sample for family in families.values() for sample in family.samples]

    def value(name, **labels):
        found = [s.value for s in samples if s.name == name and s.labels == labels]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    assert value("kv54_up", node=node) == 1 and value("kv54_up", node=dead) == 0
    assert value("kv54_requests_total", node=node, method="set") == int(sets)
    took = "kv54_request_duration_seconds"
    assert value(took + "_count", node=node) == value(took + "_bucket", node=node, le="+Inf") == int(sets)
    assert 0 < value(took + "_sum", node=node) < value("kv54_uptime_seconds", node=node)
    assert not [s for s in samples if s.labels["node"] == dead and s.name not in ("kv54_up", "kv54_ready")]


main(*sys.argv[1:])
