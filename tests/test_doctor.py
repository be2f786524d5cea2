"""The self-check of the Triton kernels, with kernels that are right and kernels broken on purpose, in Triton's interpreter."""

import json
import re
import warnings

import pytest
import torch

from idefics2_fast import cli, doctor, ops

triton = pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to check")
tl = triton.language

from idefics2_fast.benchmarks.sm90.launches import interpreted, launches  # noqa: E402

CPU = torch.device("cpu")


@triton.jit
def scale_rows(X, Y, factor, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FORGETS: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < COLUMNS - FORGETS
    place = tl.program_id(0) * COLUMNS + at
    tl.store(Y + place, tl.load(X + place, mask=inside, other=0.0) * factor, mask=inside)


class Kernel:
    """y = 3 x, by `scale_rows`, and what is wrong with it."""

    def __init__(self):
        self.factor, self.gradient, self.forgets, self.raises, self.runs = 3.0, 3.0, 0, None, 0

    def scaled(self, x, factor):
        y = torch.empty_like(x)
        scale_rows[(x.shape[0],)](x, y, factor, COLUMNS=x.shape[1], BLOCK=16, FORGETS=self.forgets)
        return y

    def __call__(self, x):
        self.runs += 1
        if self.raises:
            raise self.raises
        return _Scale.apply(x, self)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel):
        ctx.kernel = kernel
        return kernel.scaled(x, kernel.factor)

    @staticmethod
    def backward(ctx, grad):
        return ctx.kernel.scaled(grad.contiguous(), ctx.kernel.gradient), None


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """An op "tripled" whose first implementation is the kernel, in the interpreter; verdicts are kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = Kernel()

    def always(device, dtype, width):
        return True

    rows = {"triton": (always, kernel), "torch": (always, lambda x: x * 3), "reference": (always, lambda x: x + x + x)}
    monkeypatch.setitem(ops.IMPLEMENTATIONS, "tripled", rows)
    monkeypatch.setitem(doctor.CASES, "tripled", lambda draw: ((draw(5, 11),), {}))
    monkeypatch.setattr(doctor, "trusts", lambda op: doctor.judge(op, CPU, torch.float32))
    forget()
    with launches(interpreted()):
        yield kernel
    forget()


def forget():
    """As a new process knows nothing."""
    doctor.judge.cache_clear()
    ops._preferred.cache_clear()


def chosen():
    return ops.choose("tripled", torch.zeros(2, 11))


def test_a_right_kernel_is_used_and_checked_once(kernel):
    assert chosen() == chosen() == "triton"
    assert kernel.runs == 1
    forget()
    assert chosen() == "triton"
    assert kernel.runs == 1, "another process reads the verdict"


def break_output(kernel):
    kernel.factor = 3.00001


def break_gradient(kernel):
    kernel.gradient = 3.00001


def break_mask(kernel):
    kernel.forgets = 1


def break_launch(kernel):
    kernel.raises = RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (break_output, "output is 3.* from the formula, torch's"),
        (break_gradient, "gradient 1 is 3.* from the formula"),
        (break_mask, "output is nan from the formula"),
        (break_launch, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_broken_kernel_gives_way_with_one_warning(kernel, fault, problem):
    fault(kernel)
    with pytest.warns(RuntimeWarning) as seen:
        answers = chosen(), ops._preferred.cache_clear(), chosen()
    assert answers == ("torch", None, "torch")
    (warning,) = seen
    assert re.search(f"Triton kernels of tripled are wrong on this device, {problem}.*`idefics2-fast doctor`", str(warning.message))
    forget()
    with pytest.warns(RuntimeWarning, match="tripled are wrong"):
        assert chosen() == "torch"
    assert kernel.runs == 1, "another process reads the verdict, and warns as well"


def test_strict_raises(kernel, monkeypatch):
    kernel.factor = 2.0
    monkeypatch.setenv(doctor.STRICT, "1")
    with pytest.raises(RuntimeError, match="tripled are wrong on this device, output is 3.3e-01 from the formula.*IDEFICS2_FAST_STRICT"):
        doctor.judge("tripled", CPU, torch.float32, strict=True)


def test_trusts_reads_the_environment_and_the_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(doctor, "judge", lambda op, device, strict: asked.append((op, device, strict)) or True)
    for value in ("", "1"):
        monkeypatch.setenv(doctor.STRICT, value)
        assert doctor.trusts("tripled")
    assert asked == [("tripled", torch.device("cuda", 3), False), ("tripled", torch.device("cuda", 3), True)]


@pytest.mark.parametrize("changed", ["_driver", "_source"])
def test_another_driver_or_source_asks_for_a_new_verdict(kernel, monkeypatch, changed):
    chosen()
    forget()
    monkeypatch.setattr(doctor, changed, lambda: "another")
    chosen()
    assert kernel.runs == 2
    assert len(json.loads(doctor.cache_file().read_text())) == 2


def test_a_file_that_cannot_be_read_is_replaced(kernel):
    doctor.cache_file().parent.mkdir()
    doctor.cache_file().write_text('{"half of a')
    assert chosen() == "triton"
    assert len(json.loads(doctor.cache_file().read_text())) == 1
    assert [path.name for path in doctor.cache_file().parent.iterdir()] == ["doctor.json"], "no temporary file stays"


def test_a_folder_that_cannot_be_written_is_no_fault_of_the_kernel(kernel, tmp_path):
    (tmp_path / "idefics2_fast").write_text("a file in the folder's place")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert chosen() == "triton"


def test_the_check_works_whatever_the_caller_is_doing(kernel):
    from torch._subclasses import FakeTensorMode

    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), FakeTensorMode()):
        with context:
            verdict = doctor.check("tripled", CPU, torch.float32)
        assert verdict.problem == ""


def test_the_check_leaves_the_random_state_alone(kernel):
    before = torch.get_rng_state()
    doctor.check("tripled", CPU, torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_every_op_with_a_kernel_has_a_case():
    assert {op for op, rows in ops.IMPLEMENTATIONS.items() if "triton" in rows} == doctor.CASES.keys()


def test_the_embedding_is_right_in_the_interpreter():
    with launches(interpreted()):
        assert doctor.check("embedding", CPU, torch.float32).problem == ""


@pytest.mark.cuda
@pytest.mark.parametrize("op", doctor.CASES)
def test_the_kernels_are_right_on_this_device(op):
    verdict = doctor.check(op, "cuda")
    assert verdict.problem == ""
    assert verdict.seconds < 20 / len(doctor.CASES)


# --- the command ---


def test_without_a_device_there_is_nothing_to_check(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "No CUDA device: the Triton kernels are not used here.\n"


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("output is 3 from the formula", 1)])
def test_the_command_prints_verdicts_and_times(monkeypatch, capsys, problem, code):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "examine", lambda op: doctor.Verdict(op, problem if op == "embedding" else "", 1.25))
    assert cli.main(["doctor"]) == code
    assert f"embedding: {problem or 'ok'} (1.2 s)\n" in capsys.readouterr().out


def test_examine_checks_anew_and_keeps(kernel):
    chosen()
    kernel.factor = 2.0
    assert doctor.examine("tripled", CPU, torch.float32).problem
    assert doctor.kept("tripled", CPU).problem
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "triton", "the process goes on with what it has"
