"""The harness itself: what it records, whom it lets have a time, how it takes turns, and that the demo tells right from wrong."""

import importlib.util
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from idefics2_fast import ops
from idefics2_fast.benchmarks import __main__ as command
from idefics2_fast.benchmarks import compare, demo, linear_cross_entropy, model, report, timing
from idefics2_fast.benchmarks.case import Case, Figure, Figures, LeftOut, Row, Scope
from idefics2_fast.benchmarks.model import LINEAR_LAYERS, MIXED_SIZES, fill
from idefics2_fast.benchmarks.providers import answer, question
from idefics2_fast.benchmarks.record import Record, read_records, write_records
from idefics2_fast.benchmarks.timing import Measurement, PeakMemory, Watch, measure, quantiles
from idefics2_fast.images import plan_crops

CPU = torch.device("cpu")
RECORD = Record(
    suite="encode",
    case="tiny fp32",
    provider="hf",
    metric="time",
    unit="s",
    value=1.5,
    low=1.25,
    high=2.0,
    device="a card",
    versions={"torch": "2.13.0"},
    commit="abc",
)


# --- records ---


def test_records_come_back_as_they_went(tmp_path):
    wrong = replace(RECORD, provider="other", value=None, low=None, high=None, note="off by 1", pass_="backward")
    write_records(tmp_path / "new" / "file.jsonl", [RECORD, wrong])
    assert read_records(tmp_path / "new" / "file.jsonl") == [RECORD, wrong]


def test_the_file_has_one_schema(tmp_path):
    write_records(tmp_path / "file.jsonl", [RECORD])
    fields = {"suite", "case", "provider", "pass", "metric", "value", "unit", "low", "high", "note", "device", "versions", "commit"}
    assert set(json.loads((tmp_path / "file.jsonl").read_text())) == fields


def test_a_newer_record_takes_the_place_of_the_same_case_alone(tmp_path):
    path = tmp_path / "file.jsonl"
    others = [
        replace(RECORD, **change) for change in ({"provider": "x"}, {"metric": "x"}, {"device": "x"}, {"case": "x"}, {"pass_": "both"})
    ]
    write_records(path, [RECORD, *others])
    newer = replace(RECORD, value=9.0, commit="def", versions={})
    write_records(path, [newer])
    assert read_records(path) == [newer, *others]


@pytest.mark.parametrize("line", ["{", "[]", '{"suite": "encode"}', RECORD.to_json()[:-1] + ', "more": 1}'])
def test_what_is_no_record_is_refused_by_its_line(tmp_path, line):
    path = tmp_path / "file.jsonl"
    path.write_text(f"{RECORD.to_json()}\n{line}\n")
    with pytest.raises(ValueError, match=r"file\.jsonl, line 2: "):
        read_records(path)


# --- timing ---


def test_quantiles():
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_watch_measures_phases_only(monkeypatch):
    now = iter([1.0, 2.0, 10.0, 13.0, 100.0, 105.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    watch = Watch(CPU)
    for phase in ("a", "b", "a"):
        watch.start(phase)
    watch.stop()
    watch.stop()
    assert watch.seconds == {"a": 6.0, "b": 3.0}


@pytest.fixture
def no_memory(monkeypatch):
    """Memory is not measured, which takes a full garbage collection for each provider."""
    monkeypatch.setattr(PeakMemory, "available", lambda device: False)


def turns(rounds, seconds=0.0, check=lambda name, output: ""):
    """The order of calls, and the results, of three providers."""
    order = []

    def call(name):
        def run(watch):
            order.append(name)
            watch.start("work")
            return name

        return run

    return order, measure({name: call(name) for name in "abc"}, check, device=CPU, seconds=seconds, rounds=rounds)


def test_providers_take_turns_after_a_first_pass(no_memory):
    order, results = turns(rounds=(3, 3))
    assert order[:3] == [*"abc"]
    assert [sorted(order[start : start + 3]) for start in (3, 6, 9)] == [[*"abc"]] * 3
    assert [len(result.rounds) for result in results.values()] == [3, 3, 3]


def test_rounds_follow_the_time_within_their_limits(no_memory):
    assert len(turns(rounds=(2, 5), seconds=0.0)[0]) == 3 * (1 + 2)
    assert len(turns(rounds=(2, 5), seconds=1e9)[0]) == 3 * (1 + 5)


def test_a_wrong_provider_gets_no_time(no_memory):
    order, results = turns(rounds=(2, 2), check=lambda name, output: "wrong as can be" if output == "b" else "")
    assert order[:3] == [*"abc"]
    assert [sorted(order[start : start + 2]) for start in (3, 5)] == [[*"ac"]] * 2
    assert results["b"] == Measurement(wrong="wrong as can be")
    assert [len(results[name].rounds) for name in "ac"] == [2, 2]


def test_what_takes_long_is_taken_once_and_counts_in_every_round(no_memory, monkeypatch):
    order = []

    def call(name, seconds):
        def run(watch):
            order.append(name)
            watch.seconds["work"] += seconds

        return run

    calls = {"slow": call("slow", 9.0), "fast": call("fast", 3.0), "like it": call("like it", 5.9)}
    results = measure(calls, lambda name, output: "", device=CPU, seconds=0.0, rounds=(3, 3), once=4.0)
    assert order[:3] == ["slow", "fast", "like it"]
    assert all(sorted(order[start : start + 2]) == ["fast", "like it"] for start in (3, 5, 7))
    assert len(order) == 9
    assert [result.seconds(["work"]) for result in results.values()] == [[9.0] * 3, [3.0] * 3, [5.9] * 3]
    assert [result.once for result in results.values()] == [True, False, False]
    case = Case("suite", calls, None, (Row("a", ("work",)),))
    assert {r.provider: r.note for r in report.records(case, results, CPU)} == {"slow": "taken once", "fast": "", "like it": ""}


def test_rounds_take_providers_in_another_order_each(no_memory):
    order = []
    calls = {name: lambda watch, name=name: order.append(name) for name in "abcd"}
    measure(calls, lambda name, output: "", device=CPU, seconds=0.0, rounds=(40, 40))
    rounds = ["".join(order[start : start + 4]) for start in range(4, len(order), 4)]
    assert len(rounds) == 40
    assert all(sorted(round) == list("abcd") for round in rounds)
    before = {pair for round in rounds for pair in itertools.pairwise(round)}
    assert len(before) == 12  # each has followed each


def test_what_is_slow_but_takes_little_time_is_taken_again(no_memory):
    calls = {name: lambda watch, seconds=seconds: watch.seconds.update(work=seconds) for name, seconds in (("slow", 3.9), ("fast", 0.1))}
    results = measure(calls, lambda name, output: "", device=CPU, seconds=0.0, rounds=(3, 3), once=4.0)
    assert [result.once for result in results.values()] == [False, False]


needs_proc = pytest.mark.skipif(not PeakMemory.available(CPU), reason="this system does not reset a process's peak memory")


def peak_of(work):
    memory = PeakMemory(CPU)
    memory.reset()
    work()
    return memory.peak() / 2**20


@needs_proc
def test_peak_memory_is_that_of_the_call():
    held = torch.ones(2**25)  # 128 MiB before the call do not count
    assert 63 <= peak_of(lambda: torch.ones(2**24)) < 80  # the kernel's own count lags by some pages
    assert peak_of(lambda: held.sum()) < 8


@needs_proc
def test_reused_memory_counts():
    """Blocks under the C library's mapping threshold stay in the process when they are freed, and no new page would be seen."""
    blocks = [bytearray(2**16) for _ in range(1024)]
    keep = bytearray(2**16)  # at the heap's end, so that the library keeps what lies below
    del blocks
    assert peak_of(lambda: [bytearray(2**16) for _ in range(1024)]) >= 60
    del keep


def test_phases_are_told_apart_by_the_runs_of_the_language_model():
    text_model = torch.nn.Identity()
    phases = []
    watch = SimpleNamespace(start=phases.append)

    def generate(inputs, new_tokens):
        phases.append("images")
        for step in range(new_tokens):
            text_model(torch.zeros(1))
            phases.append(step)

    answer(SimpleNamespace(text_model=text_model, generate=generate), None, 3, watch)
    assert phases == ["image encoding", "images", "prefill", 0, "decode", 1, 2]
    assert not text_model._forward_pre_hooks


# --- reports ---

ROW = Row("a case", ("x", "y"), steps=2, needs={"hf": 2.3, "hf-tuned": 1.1})


def measured(*rounds):
    return Measurement(rounds=[{"x": 0.25 * time, "y": 0.75 * time} for time in rounds], peaks={"x": 5, "y": 7_000_000})


RESULTS = {"hf": measured(8.0, 12.0, 100.0), "hf-tuned": measured(3.0, 6.0, 20.0), "idefics2_fast": measured(4.0, 5.0, 20.0)}


def test_speed_is_the_median_of_paired_rounds():
    assert report.speed_up(ROW, RESULTS, "idefics2_fast", "hf") == [2.0, 2.4, 5.0]
    assert report.verdicts(ROW, RESULTS) == {">= 2.3x hf": True, ">= 1.1x hf-tuned": False}


def test_records_hold_times_memory_and_speed():
    made = {(record.provider, record.metric): record for record in report.records(Case("suite", {}, None, (ROW,)), RESULTS, CPU)}
    time = made["idefics2_fast", "time"]
    assert (time.suite, time.case, time.value, time.unit) == ("suite", "a case", 2.5, "s")
    assert (time.low, time.high) == pytest.approx((2.2, 7.0))
    assert made["hf", "peak memory"].value == 7_000_000
    assert made["idefics2_fast", "speed against hf-tuned"].value == pytest.approx(1.0)
    assert len(made) == 3 + 3 + 2


def test_no_time_no_speed_and_no_pass():
    results = RESULTS | {"hf": Measurement(wrong="off by 1")}
    case = Case("suite", {}, None, (ROW,))
    made = [record for record in report.records(case, results, CPU) if "hf" in (record.provider, record.metric.split()[-1])]
    assert [(record.metric, record.value, record.note) for record in made] == [("time", None, "off by 1")]
    assert report.verdicts(ROW, results) == {">= 2.3x hf": False, ">= 1.1x hf-tuned": False}
    assert "hf has no time: off by 1" in report.case_table(case, results)


def test_tables_fit_a_terminal_of_120_columns():
    results = RESULTS | {LINEAR_LAYERS: measured(1.0, 1.0, 1.0)}
    assert max(map(len, report.case_table(Case("suite", {}, None, (ROW,)), results).splitlines())) <= 120


@pytest.mark.parametrize(("value", "text"), [(123.4, "123 s"), (1.0, "1.00 s"), (0.0456, "45.6 ms"), (7.89e-5, "78.9 us"), (5e-9, "5 ns")])
def test_seconds(value, text):
    assert report.seconds(value) == text


# --- the model's suites ---


@pytest.mark.parametrize("share", MIXED_SIZES)
def test_the_committed_sizes_are_what_they_are_said_to_be(share):
    sizes = MIXED_SIZES[share]
    assert len(sizes) == 8
    assert fill(sizes) == pytest.approx(share, abs=0.01)
    for height, width in sizes:  # the processor leaves them as they are
        (crop,) = plan_crops(height, width, split=False, shortest_edge=378, longest_edge=980)
        assert crop.size == (height, width)
    assert len(set(sizes)) == 8


def test_the_first_token_is_measured_at_the_same_share():
    assert fill(MIXED_SIZES[0.40][:4]) == pytest.approx(0.40, abs=0.01)


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def setting(request):
    return model.load_setting("tiny", getattr(torch, request.param), CPU)


def two_questions():
    return [
        question("What is this?", [Image.linear_gradient("L").resize((378, 392))]),
        question("And this?", [Image.new("RGB", (420, 378), "red")]),
    ]


@torch.inference_mode()
def test_features_are_checked_against_the_reference(setting):
    check = model._near(setting, lambda provider: provider.encode(provider.process(two_questions())))
    outputs = {provider.name: provider.encode(provider.process(two_questions())) for provider in setting.providers}
    assert {name: check(name, output) for name, output in outputs.items()} == dict.fromkeys(outputs, "")
    right = outputs["idefics2_fast"]
    assert "off by" in check("off", right * (1.001 if setting.reference is setting.tuned else 1.05))
    assert "off by" in check("swapped", right.roll(64, 0))
    assert "off by" in check("not a number", right * float("nan"))
    assert "shape" in check("short", right[1:])


@pytest.mark.parametrize("setting", ["float32"], indirect=True)
@torch.inference_mode()
def test_first_logits_of_all_providers_agree(setting):
    check = model._near(setting, lambda provider: provider.first_logits(provider.process(two_questions())))
    outputs = {provider.name: provider.first_logits(provider.process(two_questions())) for provider in setting.providers}
    assert {name: check(name, output) for name, output in outputs.items()} == dict.fromkeys(outputs, "")
    assert "off by" in check("swapped", outputs["hf"].flip(0))


def test_tokens_are_checked_against_the_reference(setting, monkeypatch):
    monkeypatch.setattr(model, "NEW_TOKENS", 6)
    case = model.decode_case(setting)
    watch = Watch(CPU)
    tokens = {name: call(watch) for name, call in case.calls.items()}
    assert {name: case.check(name, given) for name, given in tokens.items()} == dict.fromkeys(case.calls, "")
    assert set(watch.seconds) == {"image encoding", "prefill", "decode"}
    right = tokens["idefics2_fast"]
    assert "below the greatest" in case.check("last", [*right[:-1], right[0]])
    assert "below the greatest" in case.check("first", [right[1], *right[1:]])
    assert "tokens, expected 6" in case.check("short", right[:-1])


def test_the_bound_of_decoding_is_every_product_of_the_language_model(setting, monkeypatch):
    products = []
    monkeypatch.setattr(model.F, "linear", lambda x, weight, bias: products.append((x.shape[0], *weight.shape)))
    model.linear_layers(setting.engine.model, 2)(Watch(CPU))
    text = setting.engine.model.config.text
    matrices = {name: value for name, value in setting.engine.model.hf_tensors().items() if "text_model.layers" in name and value.ndim == 2}
    numel = sum(value.numel() for value in matrices.values()) + text.vocab_size * text.hidden_size
    assert {rows for rows, _, _ in products} == {1}
    assert sum(out * width for _, out, width in products) == 2 * numel


# --- the command ---


@pytest.fixture
def two_cases(monkeypatch, no_memory):
    """Stands in for the model's suites: quick to run, the second case ended by Ctrl-C or with a wrong provider where a test asks for it."""
    ending = {"second": lambda watch: watch.start("x")}

    def of_suite(suite):
        for name in ("first", "second"):
            call = ending["second"] if name == "second" else lambda watch: watch.start("x")
            calls = {"hf": call, "idefics2_fast": lambda watch: watch.start("x")}
            rows = (Row(name, ("x",), needs={"hf": 1e-9}),)
            yield Case(suite, calls, lambda name, output: output or "", rows, absent={"liger": "it is elsewhere"})

    def cases(scope):
        for suite in scope.parts:
            yield from [LeftOut(suite, "tiny", "it is odd")] if suite == "decode" else scope.first(of_suite(suite))

    monkeypatch.setattr(model, "cases", cases)
    return ending


def test_results_are_printed_and_kept(two_cases, tmp_path, capsys):
    assert command.main(["encode", "--model", "tiny", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert {(record.suite, record.case) for record in read_records(tmp_path / "out.jsonl")} == {("encode", "first"), ("encode", "second")}
    printed = capsys.readouterr().out
    assert ">= 1e-09x hf: PASS" in printed
    assert "2 of 2 requirements hold" in printed


def test_a_quick_run_takes_first_cases_and_keeps_nothing_unasked(two_cases, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "default_path", lambda device: tmp_path / "default.jsonl")
    command.main(["encode", "--quick"])
    assert not (tmp_path / "default.jsonl").exists()
    assert "1 of 1 requirements" in capsys.readouterr().out
    command.main(["encode", "--model", "tiny"])
    assert len({record.case for record in read_records(tmp_path / "default.jsonl")}) == 2


def test_ctrl_c_keeps_what_was_measured(two_cases, tmp_path, capsys):
    def interrupt(watch):
        raise KeyboardInterrupt

    two_cases["second"] = interrupt
    assert command.main(["encode", "--model", "tiny", "--out", str(tmp_path / "out.jsonl")]) == 130
    assert {record.case for record in read_records(tmp_path / "out.jsonl")} == {"first"}
    assert "1 of 1 requirements hold" in capsys.readouterr().out


@pytest.mark.parametrize(("engine", "code"), [(False, 0), (True, 1)])
def test_this_engine_wrong_sets_the_exit_code(two_cases, tmp_path, monkeypatch, engine, code):
    wrong = Case("encode", {"idefics2_fast" if engine else "hf": lambda watch: None}, lambda name, output: "off by 1", (Row("a", ("x",)),))
    monkeypatch.setattr(model, "cases", lambda scope: iter([wrong]))
    assert command.main(["encode", "--out", str(tmp_path / "out.jsonl")]) == code


def test_a_wrong_provider_is_reported(two_cases, tmp_path, capsys):
    two_cases["second"] = lambda watch: "off by 1"
    assert command.main(["encode", "--model", "tiny", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [record.value for record in read_records(tmp_path / "out.jsonl") if record.case == "second" and record.provider == "hf"] == [
        None
    ]
    assert "1 of 2 requirements hold" in capsys.readouterr().out


def test_what_is_left_out_is_said(two_cases, capsys):
    command.main(["decode", "--quick"])
    printed = capsys.readouterr().out
    assert "decode: tiny is left out: it is odd" in printed
    assert "0 of 0 requirements" in printed


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["enocde"])
    assert "no suite 'enocde': expected kernels, model, images, dora_linear" in capsys.readouterr().err


def test_who_is_absent_has_a_row_that_says_so(two_cases, tmp_path, capsys):
    assert command.main(["encode", "--model", "tiny", "--out", str(tmp_path / "out.jsonl")]) == 0
    (record,) = [r for r in read_records(tmp_path / "out.jsonl") if r.provider == "liger" and r.case == "first"]
    assert (record.metric, record.value, record.note) == ("time", None, "absent: it is elsewhere")
    assert "liger has no time: it is elsewhere" in capsys.readouterr().out


def test_what_is_left_out_is_kept_with_its_reason(two_cases, tmp_path):
    command.main(["decode", "--out", str(tmp_path / "out.jsonl")])
    (record,) = read_records(tmp_path / "out.jsonl")
    assert (record.suite, record.case, record.value, record.note) == ("decode", "tiny", None, "absent: it is odd")


def test_an_absent_baseline_is_no_failure():
    results = {"idefics2_fast": Measurement(rounds=[{"x": 1.0}]), "hf": Measurement(absent="gone"), "old": Measurement(wrong="off")}
    assert report.verdicts(Row("a", ("x",), needs={"hf": 2, ("hf", "old"): 1, "old": 1}), results) == {">= 1x old": False}


def test_groups_are_suites_and_every_suite_has_its_cases():
    for name, parts in command.GROUPS.items():
        assert set(parts) <= set(command.SUITES), name
    for home in set(command.SUITES.values()):
        if home != "sm90.suite" or importlib.util.find_spec("triton"):
            assert callable(importlib.import_module(f"idefics2_fast.benchmarks.{home}").cases)


def test_a_suite_whose_packages_are_missing_is_left_out(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError("No module named 'grain'", name="grain")

    monkeypatch.setattr(command.importlib, "import_module", missing)
    assert command.main(["instruct", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [(r.suite, r.note) for r in read_records(tmp_path / "out.jsonl")] == [("instruct", "absent: grain is not installed")]


def test_results_go_to_the_file_of_the_device_that_they_were_taken_on(monkeypatch, no_memory, tmp_path):
    def cases(scope):
        call = {"idefics2_fast": lambda watch: watch.start("x")}
        yield Case("encode", call, lambda name, output: "", (Row("all threads", ("x",)),))
        yield Case("encode", call, lambda name, output: "", (Row("alone", ("x",)),), device=CPU, threads=3)
        yield Figures("encode", "paper", [Figure("floor", 1.0, "s")], device="a card")

    monkeypatch.setattr(model, "cases", cases)
    monkeypatch.setattr(command, "default_path", lambda device: tmp_path / f"{device}.jsonl")
    before = torch.get_num_threads()
    command.main(["encode"])
    kept = {path.name: [record.case for record in read_records(path)] for path in tmp_path.iterdir()}
    assert kept.pop("a card.jsonl") == ["paper"]
    assert [name.endswith(", 3 threads.jsonl") for name, cases in kept.items() if cases == ["alone"]] == [True]
    assert torch.get_num_threads() == before


def test_figures_are_held_to_their_limits(capsys, monkeypatch, tmp_path):
    figures = [Figure("fill", 0.95, "", 0.9), Figure("wait", 0.03, "", 0.02, at_least=False), Figure("seen", 2.0, "s")]
    monkeypatch.setattr(model, "cases", lambda scope: iter([Figures("encode", "data", figures)]))
    command.main(["encode", "--out", str(tmp_path / "out.jsonl")])
    printed = capsys.readouterr().out
    assert ">= 0.9  PASS" in printed
    assert "<= 0.02  FAIL" in printed
    assert "1 of 2 requirements hold" in printed


def test_a_quick_run_asks_for_the_first_case_of_one_size():
    assert Scope(quick=True).sizes == ("tiny",)
    assert Scope(quick=True, model="small").sizes == ("small",)
    assert Scope().sizes == ("tiny", "small")
    assert list(Scope(quick=True).first("abc")) == ["a"]
    assert list(Scope().first("abc")) == ["a", "b", "c"]


# --- a file of results against another ---

TIME = replace(RECORD, provider="idefics2_fast", value=1.0)
SPEED = replace(TIME, metric="speed against hf", unit="x", value=2.0)


def compared(tmp_path, old, new, *options):
    for name, records in (("old", old), ("new", new)):
        (tmp_path / name).unlink(missing_ok=True)
        write_records(tmp_path / name, records)
    return command.main(["--compare", str(tmp_path / "old"), str(tmp_path / "new"), *options])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"value": 1.09}, 0),
        ({"value": 1.11}, 1),
        ({"value": 0.5}, 0),
        ({"value": None, "note": "off by 1"}, 1),
        ({"value": None, "note": "absent: gone"}, 1),
        ({"device": "another"}, 1),  # nothing in common
    ],
)
def test_a_time_that_grew_is_a_regression(tmp_path, change, code):
    assert compared(tmp_path, [TIME], [replace(TIME, **change)]) == code


@pytest.mark.parametrize(
    ("change", "code"), [({"value": 1.85}, 0), ({"value": 1.8}, 1), ({"value": 9.0}, 0), ({"value": 1.8, "device": "another"}, 1)]
)
def test_a_ratio_that_fell_is_a_regression_on_any_device(tmp_path, change, code):
    assert compared(tmp_path, [SPEED], [replace(SPEED, **change)]) == code


def test_an_overhead_is_better_when_it_is_small(tmp_path):
    overhead = replace(SPEED, metric="time overhead against peft", value=0.2)
    assert compared(tmp_path, [overhead], [replace(overhead, value=0.1)]) == 0
    assert compared(tmp_path, [overhead], [replace(overhead, value=0.23)]) == 1


def test_the_threshold_is_given_and_the_regression_named(tmp_path, capsys):
    assert compared(tmp_path, [TIME], [replace(TIME, value=1.11)], "--threshold", "0.2") == 0
    assert compared(tmp_path, [TIME], [replace(TIME, value=1.5)], "--threshold", "0.2") == 1
    printed = capsys.readouterr().out
    assert "encode: tiny fp32" in printed
    assert "50%" in printed


def loss_results(path):
    case = linear_cross_entropy.loss_case("frozen", CPU, tokens=256)
    calls = {name: case.calls[name] for name in ("torch", "idefics2_fast")}
    results = measure(calls, case.check, device=CPU, seconds=0, rounds=(3, 3))
    write_records(path, report.records(replace(case, calls=calls), results, CPU))
    return results


@pytest.mark.slow
def test_a_slowed_kernel_is_flagged(tmp_path, monkeypatch, no_memory):
    """The loss with the work of its answer rows done three times over."""
    monkeypatch.setattr(linear_cross_entropy, "ACCURACY", 1e-4)  # of so few rows
    loss_results(tmp_path / "old")
    plain = ops.linear_cross_entropy

    def slowed(*args, **kwargs):
        for _ in range(3):
            out = plain(*args, **kwargs)
        return out

    monkeypatch.setattr(ops, "linear_cross_entropy", slowed)
    loss_results(tmp_path / "new")
    worse = [line[1:3] for line in compare.regressions(read_records(tmp_path / "old"), read_records(tmp_path / "new"), 0.3)]
    assert ["idefics2_fast", "speed against torch"] in worse


def test_a_wrong_kernel_gets_no_time_and_is_flagged(tmp_path, monkeypatch, no_memory):
    monkeypatch.setattr(linear_cross_entropy, "ACCURACY", 1e-4)
    loss_results(tmp_path / "old")
    monkeypatch.setitem(linear_cross_entropy.LOSSES, "idefics2_fast", lambda *args: 1.01 * linear_cross_entropy.engine_loss(*args))
    results = loss_results(tmp_path / "new")
    assert results["idefics2_fast"].rounds == []
    assert "off by 1.0e-02" in results["idefics2_fast"].wrong
    (line,) = [
        line
        for line in compare.regressions(read_records(tmp_path / "old"), read_records(tmp_path / "new"), 10.0)
        if line[1] == "idefics2_fast"
    ]
    assert "off by" in line[-1]


# --- the demo ---


@pytest.mark.parametrize("name", demo.PLACES)
def test_the_photographs_ship_in_the_packages(name):
    with Image.open(demo.photograph(name)) as image:
        assert min(image.size) >= 300


def test_a_missing_photograph_ends_the_demo_in_one_line(monkeypatch):
    monkeypatch.setitem(demo.PLACES, "china.jpg", ("no_such_package", "data"))
    with pytest.raises(SystemExit, match=r"^The file china\.jpg ships in the package no_such_package, which is not installed: pip"):
        demo.compare()


class Answering:
    """A provider that gives fixed token ids, the number of the prompt first."""

    def __init__(self, name, last):
        self.name, self.last, self.text_model = name, last, torch.nn.Identity()
        self.model = torch.nn.Linear(2, 2)
        self.processor = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"answer\x1b {ids}")

    def process(self, chats, split):
        return len(chats)

    def generate(self, inputs, new_tokens):
        for _ in range(2):
            self.text_model(torch.zeros(1))
        return [[prompt, self.last] for prompt in range(inputs)]


@pytest.mark.parametrize(("last", "code"), [(7, 0), (8, 1)])
def test_the_demo_fails_where_token_ids_differ(monkeypatch, no_memory, capsys, last, code):
    providers = [Answering("hf", 7), Answering("hf-tuned", 7), Answering("idefics2_fast", last)]
    monkeypatch.setattr(demo, "load_providers", lambda size, dtype, device: providers)
    assert demo.compare() == code
    printed = capsys.readouterr().out
    prompts = sum(map(len, demo.BATCHES.values()))
    assert printed.count("identical:") == (0 if code else prompts)
    assert printed.count("DIFFERENT:") == (prompts if code else 0)
    assert ("idefics2_fast gave other token ids than transformers." in printed) == bool(code)
    assert ("All token ids are identical." in printed) == (not code)
    assert max(map(len, printed.splitlines())) <= 120
    assert "\x1b" not in printed


def test_files_that_cannot_be_compared_are_named_in_a_line(tmp_path, capsys):
    (tmp_path / "bad").write_text('{"a": 1}\n')
    for old, message in (("missing", "No such file"), ("bad", "line 1: not a record of this schema")):
        with pytest.raises(SystemExit) as end:
            command.main(["--compare", str(tmp_path / old), str(tmp_path / "bad")])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
