"""The shared half of the benches: facts of programs, turns, rows, bars, the table and its file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.bench import measure
from d2g_jax.bench.measure import Bar, Candidate


def test_facts_of_a_product():
    a, b = jnp.ones((32, 64)), jnp.ones((64, 16))
    candidate = measure.compile_candidate("product", "float32", lambda a, b: a @ b, a, b)
    np.testing.assert_array_equal(candidate.call(), np.full((32, 16), 64))
    facts = candidate.facts
    assert facts.flops == 2 * 32 * 64 * 16
    assert facts.output_bytes == 4 * 32 * 16
    assert facts.compile_seconds > 0


def test_temporary_memory_is_counted():
    def through_a_large_array(x):
        return (x[:, None] * x[None, :]) @ x  # the outer product is an operand, so it has to stand in memory

    candidate = measure.compile_candidate("large", "float32", through_a_large_array, jnp.ones(512))
    assert candidate.facts.temp_bytes >= 4 * 512 * 512


def test_a_program_without_its_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda: 2**20)
    large = measure.compile_candidate("large", "float32", lambda x: jnp.broadcast_to(x, (1024, 1024)) + x, jnp.ones(()))
    assert large.call is None
    assert large.not_run == "needs 0.0 GiB of memory, 0.0 GiB are free"
    monkeypatch.setattr(measure, "available_bytes", lambda: None)
    assert measure.compile_candidate("large", "float32", jnp.ones_like, jnp.ones(())).call is not None
    (row,) = measure.time_in_turns([large], 1)
    assert row["seconds"] is None
    assert row["temp_bytes"] == large.facts.temp_bytes
    assert row["not_run"] == large.not_run


def test_available_memory_is_that_of_the_machine():
    free = measure.available_bytes()
    assert free is None or 2**20 < free < 2**50


def timed(name, order, dtype="float32", facts=None):
    return Candidate(name, dtype, lambda: order.append(name), facts, describe=lambda _: {"value": len(order)})


def test_candidates_take_turns(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) / 4)  # a call takes 0.25 seconds
    order = []
    rows = measure.time_in_turns([timed("a", order), timed("b", order)], rounds=3)
    assert order == ["a", "b", *(["a"] * 4 + ["b"] * 4) * 3]  # a turn ends with the call that completes a second
    assert [row["value"] for row in rows] == [1, 2]
    assert [len(row["all_seconds"]) for row in rows] == [12, 12]
    np.testing.assert_allclose([row["seconds"] for row in rows], 0.25)


def test_a_turn_of_short_calls_ends(monkeypatch):
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 0.0)
    order = []
    measure.time_in_turns([timed("a", order)], rounds=2)
    assert len(order) == 1 + 2 * 10


def test_share_of_peak_is_by_the_product_of_the_same_dtype(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    facts = lambda flops: measure.Facts(1.0, 0, 0, flops)  # noqa: E731
    candidates = [
        timed(measure.PRODUCT, [], "float32", facts(1000.0)),
        timed("a", [], "float32", facts(250.0)),
        timed("a", [], "bfloat16", facts(250.0)),
        timed("b", [], "float32"),
    ]
    assert [row["share_of_peak"] for row in measure.time_in_turns(candidates, 1)] == [1, 0.25, None, None]


def test_the_peak_is_the_best_call_of_the_product(monkeypatch):
    monkeypatch.setattr(measure, "_TURN_CALLS", 1)
    times = iter([0, 4, 10, 11, 20, 22, 30, 32])  # of the product 4 s and 2 s, of the other one 1 s and 2 s
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(times)))
    facts = measure.Facts(1.0, 0, 0, 100.0)
    rows = measure.time_in_turns([timed(measure.PRODUCT, [], facts=facts), timed("a", [], facts=facts)], 2)
    assert measure.peaks(rows) == {"float32": 50.0}
    assert [row["share_of_peak"] for row in rows] == [pytest.approx(2 / 3), pytest.approx(4 / 3)]


def test_flops_leave_out_what_has_no_gradient():
    x = jnp.ones((8, 8))
    one = lambda x, y: (x @ x).sum() + (jax.lax.stop_gradient(y) @ y).sum()  # noqa: E731
    forward, both = (measure.flops(jax.jit(f).trace(x, x)) for f in (one, jax.grad(one)))
    assert forward >= 2 * (2 * 8**3)
    assert both < forward + 2 * 2 * 8**3 + 10 * 8**2


def test_bars():
    assert [Bar.at_least("", x, 2.0).met for x in (2.0, 1.9, None)] == [True, False, None]
    assert [Bar.at_most("", x, 2.0).met for x in (2.0, 2.1, None)] == [True, False, None]
    assert measure.ratio(3.0, 2.0) == 1.5
    assert measure.ratio(None, 2.0) is measure.ratio(2.0, None) is None


@pytest.fixture
def report():
    refused = Candidate("heavy", "float32", None, not_run="needs 9.9 GiB of memory, 1.0 GiB are free")
    rows = measure.time_in_turns([measure.product_candidate("float32"), timed("a", []), refused], 1)
    bars = [Bar.at_most("a takes at most 2 of b", 1.5, 2), Bar.at_least("c", 1.0, 2), Bar.at_least("d", None, 2)]
    return measure.make_report("loss", {"size": 64}, rows, bars)


def test_report_as_text(report):
    first, place, _, headings, *table = measure.format_report(report).splitlines()
    assert first == "bench loss: size=64"
    assert report["date"] in place
    assert f"jax {jax.__version__}" in place
    assert "compile s" in headings
    assert table[0].startswith(measure.PRODUCT)
    assert table[0].split()[-2].endswith("%")
    assert table[1].startswith("a ")
    assert table[3] == "heavy float32: not run: needs 9.9 GiB of memory, 1.0 GiB are free"
    assert table[-3:] == [
        "met          a takes at most 2 of b: 1.5",
        "MISSED       c: 1",
        "not measured d",
    ]


def test_report_is_json(report):
    assert json.loads(json.dumps(report)) == report
    assert report["environment"]["python"]
    assert report["environment"]["cores"] >= 1
