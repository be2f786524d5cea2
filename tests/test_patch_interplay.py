"""A patched model among what people use with it: losses, generate, checkpointing, wrappers, hooks, copies, other switches."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from support.hf import sample, to_hf
from support.patched import (
    LATENTS,
    TEXT,
    TINY,
    TOLERANCE,
    differences,
    evaluated,
    fresh,
    inputs_of,
    kept,
    relative,
    trained,
    with_adapter,
    worst,
)
from torch import nn

import idefics2_fast
from idefics2_fast.benchmarks.local_checkpoint import write_processor
from idefics2_fast.patching import ledger, liger


@pytest.fixture(scope="module")
def model():
    return fresh()


def loss_of(model, inputs, **others):
    with torch.no_grad():
        return model.train()(**inputs, **others).loss


# The loss.


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": 5},
        {"ignore_index": 5},
        {"logits_to_keep": 10},
        {"skip_logits": False},
    ],
    ids=str,
)
def test_arguments_of_the_loss(model, arguments):
    inputs = inputs_of("one image")
    if "ignore_index" in arguments:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
    if "logits_to_keep" in arguments:
        inputs["labels"] = inputs["labels"][:, -10:]
    expected = loss_of(model, inputs, **{name: value for name, value in arguments.items() if name != "skip_logits"})
    with idefics2_fast.patch(model):
        assert relative(loss_of(model, inputs, **arguments), expected) <= TOLERANCE


def test_labels_that_are_shifted_already(model):
    inputs = inputs_of("one image")
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[..., 1:].roll(1, 1)
    expected = loss_of(model, inputs, shift_labels=shifted)
    with idefics2_fast.patch(model):
        assert relative(loss_of(model, inputs, shift_labels=shifted), expected) <= TOLERANCE


def test_when_there_are_logits(model):
    inputs = inputs_of("one image")
    with idefics2_fast.patch(model), torch.no_grad():
        assert model.train()(**inputs).logits is None
        assert "logits" not in model(**inputs)
        assert len(model(**inputs, return_dict=False)) == len(model(**inputs))
        assert model(**inputs, skip_logits=False).logits is not None
        assert model(**inputs | {"labels": None}).logits is not None
        assert model.eval()(**inputs).logits is not None
        assert model(**inputs, skip_logits=True).logits is None
        with pytest.raises(ValueError, match="skip_logits is True, expected labels"):
            model(**inputs | {"labels": None}, skip_logits=True)
        with pytest.raises(ValueError, match=r"labels have shape \[1, 10\]"):
            model(**inputs | {"labels": inputs["labels"][:, -10:]}, skip_logits=True)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        assert model.train()(ids, mask, **inputs).logits is None


def test_a_loss_function_of_the_users_is_left(model):
    with idefics2_fast.patch(model), torch.no_grad():
        model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + 3
        output = model.train()(**inputs_of("one image"))
    del model._loss_function
    assert output.loss == 3
    assert output.logits is not None


def test_no_answer_at_all(model):
    """Hugging Face's mean of nothing is NaN; a sum over the items of a batch is 0 and has gradients."""
    inputs = inputs_of("one image")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with idefics2_fast.patch(model):
        assert loss_of(model, inputs).isnan()
        loss = model.train()(**inputs, num_items_in_batch=torch.tensor(4)).loss
        loss.backward()
    assert loss == 0
    assert not model.lm_head.weight.grad.any()
    model.zero_grad()


class Doubled(nn.Linear):
    """A head that is more than its matrix, as adapters and quantised layers are."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("wrapped", ["subclass", "hook", "bias"])
def test_a_head_that_is_no_plain_matrix_is_called_on_answer_rows(wrapped):
    model, inputs, seen = fresh(), inputs_of("one image"), []
    if wrapped == "subclass":
        model.lm_head.__class__ = Doubled
    elif wrapped == "bias":
        model.lm_head.bias = nn.Parameter(torch.arange(model.lm_head.out_features) / 1e4)
    model.lm_head.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape) or (output if wrapped != "hook" else output * 3)
    )
    expected = trained(model, inputs)
    with idefics2_fast.patch(model) as handle:
        assert worst(trained(model, inputs), expected)[0] <= TOLERANCE
        assert f"through {type(model.lm_head).__name__}" in handle.report()["Idefics2ForConditionalGeneration"]
    answers = (inputs["labels"][:, 1:] != -100).sum()
    assert seen[-1] == (answers, TINY.text.hidden_size)


# Generation.


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate(model, settings):
    inputs = inputs_of()
    del inputs["labels"]
    settings = settings | {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.eval().generate(**inputs, **settings)
    with idefics2_fast.patch(model):
        assert torch.equal(model.generate(**inputs, **settings), expected)


def test_encoded_images_may_be_handed_over(model):
    inputs = inputs_of()
    expected = evaluated(model, inputs)
    images = {name: inputs.pop(name) for name in ("pixel_values", "pixel_attention_mask")}
    with idefics2_fast.patch(model), torch.no_grad():
        encoded = model.get_image_features(**images)
        assert relative(evaluated(model, inputs | {"mm_encoder_outputs": {"image": encoded}}), expected) <= TOLERANCE


def test_embeddings_in_place_of_tokens(model):
    inputs = inputs_of()
    expected = evaluated(model, inputs)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    with idefics2_fast.patch(model):
        assert relative(evaluated(model, inputs | {"inputs_embeds": embeddings}), expected) <= TOLERANCE


def test_signatures_stay(model):
    names = [(model, "forward"), (model.model, "forward"), (model.model, "get_image_features"), (model.model.vision_model, "forward")]
    before = [inspect.signature(getattr(owner, name)) for owner, name in names]
    with idefics2_fast.patch(model):
        assert [inspect.signature(getattr(owner, name)) for owner, name in names] == before


# Training as it is set up elsewhere.


def checkpoint_activations(model, settings: dict[str, bool]) -> None:
    """By transformers' name for it: another one before 5.23."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(settings)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, inputs = with_adapter(fresh(), use_dora=True), inputs_of()
    model.enable_input_require_grads()
    expected = trained(model, inputs)
    checkpoint_activations(model, {"use_reentrant": reentrant})
    calls = []
    model.base_model.model.model.vision_model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with idefics2_fast.patch(model):
        actual = trained(model, inputs)
    assert worst(actual, expected)[0] <= TOLERANCE
    assert len(calls) == 2  # the second time in the backward pass


def test_autocast(model):
    inputs = inputs_of()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            return trained(model, inputs)

    exact, theirs = trained(model, inputs), step()
    with idefics2_fast.patch(model):
        ours = step()
    assert worst(ours, exact)[0] <= 2 * worst(theirs, exact)[0]
    assert ours["loss"].dtype == torch.float32


def test_modules_to_save():
    model = with_adapter(fresh(), targets=TEXT, modules_to_save=["connector", "lm_head", "vision_model"])
    inputs, before = inputs_of(), kept(model)
    expected = trained(model, inputs)
    assert any("modules_to_save.default.perceiver_resampler.latents" in name for name in expected)
    with idefics2_fast.patch(model) as handle:
        assert worst(trained(model, inputs), expected)[0] <= TOLERANCE
        assert "through ModulesToSaveWrapper" in str(handle.report())
    assert differences(before, kept(model)) == []


def test_adapters_on_the_patch_embedding():
    model, inputs = with_adapter(fresh(), targets=r".*patch_embedding$"), inputs_of()
    logits, expected = evaluated(model, inputs), trained(model, inputs)
    with idefics2_fast.patch(model):
        assert relative(evaluated(model, inputs), logits) <= TOLERANCE
        assert worst(trained(model, inputs), expected)[0] <= TOLERANCE


def test_dora_variants_come_and_go():
    model = with_adapter(fresh(), targets=TEXT, use_dora=True)
    layer = model.base_model.model.model.text_model.layers[0].mlp.up_proj
    theirs = layer.lora_variant["default"]
    with idefics2_fast.patch(model) as handle:
        assert layer.lora_variant["default"] is not theirs
        lines = {name: what for name, what in handle.report().items() if "lora_variant" in name}
    assert len(lines) == 3 * 7
    assert layer.lora_variant["default"] is theirs
    with idefics2_fast.patch(model, dora=False):
        assert layer.lora_variant["default"] is theirs


def test_dora_on_embeddings_is_left_to_peft():
    model = with_adapter(fresh(), targets=r".*embed_tokens$", use_dora=True)
    with idefics2_fast.patch(model) as handle:
        assert "PEFT's: adapter 'default' of Embedding" in str(handle.report())
    with pytest.raises(ValueError, match="left to PEFT"):
        idefics2_fast.patch(model, strict=True)
    assert not any(True for module in model.modules() for _ in ledger.patched_names(module))


def test_hooks_run_on_packed_rows():
    model, inputs, seen = fresh(), inputs_of(), {}
    parts = ["vision_model", "vision_model.embeddings", "vision_model.encoder.layers.1.self_attn", "vision_model.encoder.layers.2.mlp.fc1"]
    parts += ["connector", "connector.modality_projection", "connector.perceiver_resampler", "connector.perceiver_resampler.layers.0"]
    for part in parts:
        model.model.get_submodule(part).register_forward_hook(lambda module, args, output, part=part: seen.update({part: output}))
    with idefics2_fast.patch(model):
        evaluated(model, inputs)
    assert seen.keys() == set(parts)
    patches = 4 * 6 + 7 * 3 + 4 * 4 + 4 * 4
    assert seen["vision_model.encoder.layers.2.mlp.fc1"].shape == (1, patches, TINY.vision.intermediate_size)
    assert seen["connector"].shape == (1, 4 * LATENTS, TINY.text.hidden_size)


def test_neftune_s_hook_is_exchanged_while_training():
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune

    model, inputs = fresh(), inputs_of()
    quiet, before = loss_of(model, inputs), kept(model)
    with idefics2_fast.patch(model):
        hook = activate_neftune(model, 5.0)
        assert loss_of(model, inputs) != quiet
        theirs = "neftune_post_forward_hook"
        assert all(getattr(hook, "__name__", "") != theirs for hook in model.get_input_embeddings()._forward_hooks.values())
        deactivate_neftune(model, hook)
        assert relative(loss_of(model, inputs), quiet) <= 1e-6
    assert differences(before, kept(model)) == []


# Other wrappers.


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_s_hooks(when):
    """Weights kept elsewhere until a module is called, as with `device_map`."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = fresh(), inputs_of()
    logits = evaluated(model, inputs)
    if when == "after":
        handle = idefics2_fast.patch(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    if when == "before":
        handle = idefics2_fast.patch(model)
    assert relative(evaluated(model, inputs), logits) <= TOLERANCE
    with torch.no_grad():
        loss = model.train()(**inputs).loss
    handle.undo()
    assert relative(evaluated(model, inputs), logits) <= 1e-6
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any(True for module in model.modules() for _ in ledger.patched_names(module))
    assert relative(loss, loss_of(fresh(), inputs)) <= TOLERANCE


def test_who_wrapped_the_patch_is_served_after_it_is_undone(model):
    inputs = inputs_of()
    handle = idefics2_fast.patch(model)
    beneath = model.forward
    model.forward = types.MethodType(functools.wraps(type(model).forward)(lambda self, *args, **kwargs: beneath(*args, **kwargs)), model)
    with torch.no_grad():
        assert model.train()(**inputs).logits is None
        handle.undo()
        assert model.train()(**inputs).logits is not None
    del model.forward
    model.forward = functools.partial(type(model).forward, model)
    with pytest.raises(ValueError, match="forward of Idefics2ForConditionalGeneration is not transformers' own"):
        idefics2_fast.patch(model, strict=True)
    with idefics2_fast.patch(model) as handle:
        assert "not transformers' own" in handle.report()["Idefics2ForConditionalGeneration"]
    del model.forward


@pytest.mark.slow
def test_compiled(model):
    inputs = inputs_of("several images")
    expected = evaluated(model, inputs)
    with idefics2_fast.patch(model):
        assert relative(evaluated(torch.compile(model, backend="eager"), inputs), expected) <= TOLERANCE
    torch.compiler.reset()


def test_copies_and_pickles():
    """Both are patched as the model is; a copy is undone with it, a pickle may be patched anew."""
    model, inputs = with_adapter(fresh(), use_dora=True), inputs_of()
    expected = trained(model, inputs)
    with idefics2_fast.patch(model):
        twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (twin, pickled):
            assert worst(trained(other, inputs), expected)[0] <= TOLERANCE
            with torch.no_grad():
                assert other.train()(**inputs).logits is None
        with torch.no_grad():
            for parameter in pickled.parameters():
                parameter.zero_()
    assert worst(trained(model, inputs), expected)[0] <= 1e-6
    with torch.no_grad():
        assert twin.train()(**inputs).logits is not None
    for other in (twin, pickled):
        idefics2_fast.patch(other).undo()
        plain = vars(model.get_base_model())
        assert vars(other.get_base_model()).keys() == plain.keys()
        kinds = {type(variant).__name__ for module in other.modules() for variant in getattr(module, "lora_variant", {}).values()}
        assert kinds == {"DoraLinearVariant"}


def test_several_models(model):
    inputs, second = inputs_of(), fresh(seed=1)
    expected = [evaluated(model, inputs), evaluated(second, inputs)]
    with idefics2_fast.patch(model):
        with idefics2_fast.patch(second):
            both = [evaluated(model, inputs), evaluated(second, inputs)]
        assert torch.equal(evaluated(second, inputs), expected[1])
        assert torch.equal(evaluated(model, inputs), both[0])
    assert max(relative(ours, theirs) for ours, theirs in zip(both, expected, strict=True)) <= TOLERANCE


def test_saved_is_as_if_unpatched(model, tmp_path):
    model.save_pretrained(tmp_path / "unpatched")
    names = model.state_dict().keys()
    with idefics2_fast.patch(model):
        assert model.state_dict().keys() == names
        model.save_pretrained(tmp_path / "patched")
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in sorted(tmp_path.iterdir())]
    assert files[0] == files[1]


def test_the_report_says_what_is_quantised():
    class Linear4bit(nn.Linear):
        __module__ = "bitsandbytes.nn.modules"

    model = fresh()
    model.model.text_model.layers[1].mlp.up_proj.__class__ = Linear4bit
    inputs = inputs_of()
    expected = trained(model, inputs)
    with idefics2_fast.patch(model) as handle:
        assert handle.report()["model.text_model.layers.1.mlp.up_proj"] == "bitsandbytes's Linear4bit, as it came"
        assert worst(trained(model, inputs), expected)[0] <= TOLERANCE


def test_the_report_reads_as_a_table(model):
    with idefics2_fast.patch(model) as handle:
        lines = str(handle.report()).splitlines()
        assert any(
            "vision_model.encoder.layers.*.self_attn" in line and "3 x  packed patches, segment_attention: sdpa" in line for line in lines
        )
        if not liger.installed():
            assert any("text_model.layers.*.mlp " in line and "liger_kernel is not installed" in line for line in lines)
        assert handle.report()["model.connector.perceiver_resampler.layers.1.self_attn"].startswith("packed patches")
    assert set(handle.report().values()) == {"Hugging Face's: the patch is undone"}


# Classes, for models not yet built.


def test_classes():
    from transformers.models.idefics2 import modeling_idefics2 as idefics2

    classes = [value for value in vars(idefics2).values() if isinstance(value, type) and value.__module__ == idefics2.__name__]
    before = [dict(vars(cls)) for cls in classes]
    inputs = inputs_of()
    expected = trained(fresh(), inputs)
    with idefics2_fast.patch_classes() as handle:
        model = fresh()
        assert worst(trained(model, inputs), expected)[0] <= TOLERANCE
        with torch.no_grad():
            assert model.train()(**inputs).logits is None
        with pytest.raises(ValueError, match="patched already"):
            idefics2_fast.patch_classes()
        adapted = with_adapter(fresh(), use_dora=True)
        by_peft = trained(adapted, inputs)
        with idefics2_fast.patch(adapted) as more:  # what belongs to an instance comes on top
            assert worst(trained(adapted, inputs), by_peft)[0] <= TOLERANCE
            kinds = set(more.report().values())
        assert any("DoRA" in kind for kind in kinds)
        assert not any("packed" in kind for kind in kinds)
        assert "Idefics2VisionAttention" in str(handle.report())
    for cls, had in zip(classes, before, strict=True):
        had, has = (
            {name: value for name, value in names.items() if not name.startswith("_can_set_")} for names in (had, vars(cls))
        )  # caches
        assert {name for name in has.keys() | had.keys() if has.get(name) is not had.get(name)} == set(), cls
    assert worst(trained(model, inputs), expected)[0] <= 1e-6
    with pytest.raises(TypeError, match="dora"):
        idefics2_fast.patch_classes(dora=True)
    idefics2_fast.patch(model).undo()


# The name for attention.


@pytest.mark.parametrize("window", [None, 16])
def test_the_name_for_attention(window):
    """Padded samples, as they come out with eager attention; without the mask function they go wrong in silence."""
    idefics2_fast.register_attention()
    model, inputs = fresh(), inputs_of()
    model.config.text_config.sliding_window = window
    model.set_attn_implementation("eager")
    expected = evaluated(model, inputs)
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(**prompt, **settings)
    model.set_attn_implementation("idefics2_fast")
    assert relative(evaluated(model, inputs), expected) <= TOLERANCE
    assert torch.equal(model.generate(**prompt, **settings), tokens)
    with idefics2_fast.patch(model):
        assert relative(evaluated(model, inputs), expected) <= TOLERANCE


def test_without_the_mask_function_padding_is_seen():
    from transformers import AttentionMaskInterface

    idefics2_fast.register_attention()
    model, inputs = fresh(), inputs_of()
    expected = evaluated(model, inputs)
    masks = AttentionMaskInterface._global_mapping
    kept_mask = masks["idefics2_fast"]
    model.set_attn_implementation("idefics2_fast")
    masks["idefics2_fast"] = lambda *args, **kwargs: None
    try:
        assert relative(evaluated(model, inputs), expected) > 10 * TOLERANCE
    finally:
        masks["idefics2_fast"] = kept_mask


def test_the_name_for_attention_takes_segments(model):
    from idefics2_fast import Segments, ops
    from idefics2_fast.patching.attention import attention

    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    segments = Segments.of_lengths([5, 7])
    layer = model.model.text_model.layers[0].self_attn
    out, weights = attention(layer, q, k, v, segments, scaling=0.3, sliding_window=3)
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    with ops.using(segment_attention="reference"):
        expected = ops.segment_attention(*rows, segments, scale=0.3, causal=True, window=3)
    assert weights is None
    assert relative(out[0], expected) <= 1e-6


# liger_kernel, played by functions that write into what they are given, as its kernels do.


class Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        of_gate, of_up = grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
        return gate.data.copy_(of_gate), up.data.copy_(of_up)


class Rope(torch.autograd.Function):
    @staticmethod
    def turn(x, cos, sin):
        half = x.shape[-1] // 2
        return x.data.copy_(x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None])

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rope.turn(q, cos, sin).view_as(q), Rope.turn(k, cos, sin).view_as(k), cos.view_as(cos), sin.view_as(sin)

    @staticmethod
    def backward(ctx, of_q, of_k, *_):
        cos, sin = ctx.saved_tensors
        return Rope.turn(of_q.clone(), cos, -sin), Rope.turn(of_k.clone(), cos, -sin), None, None


def liger_rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert (offset, casting_mode, in_place) == (0.0, "llama", False)
    CALLS.append("rms_norm")
    return F.rms_norm(x, weight.shape, weight, eps)


CALLS: list[str] = []


@pytest.fixture
def stand_in(monkeypatch):
    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_rms_norm = liger_rms_norm
    functional.liger_swiglu = lambda a, b: CALLS.append("swiglu") or Swiglu.apply(a, b)
    functional.liger_rope = lambda q, k, cos, sin, position_ids=None, unsqueeze_dim=1: CALLS.append("rope") or Rope.apply(q, k, cos, sin)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setattr(liger, "installed", lambda: True)
    CALLS.clear()


@pytest.mark.parametrize("adapter", [None, {"use_dora": True}], ids=["plain", "DoRA"])
def test_liger_s_ops_on_a_device_that_suits(stand_in, monkeypatch, adapter):
    monkeypatch.setattr(liger, "suits", lambda device: True)
    model = fresh() if adapter is None else with_adapter(fresh(), **adapter)
    inputs, before = inputs_of(), kept(model)
    logits, expected = evaluated(model, inputs), trained(model, inputs)
    with idefics2_fast.patch(model, strict=True) as handle:
        assert relative(evaluated(model, inputs), logits) <= TOLERANCE
        assert {name: CALLS.count(name) for name in ("rms_norm", "swiglu", "rope")} == {
            "rms_norm": 2 * 3 + 1 + 2 * 3 + 1,
            "swiglu": 6,
            "rope": 3,
        }
        error, place = worst(trained(model, inputs), expected)
        assert error <= TOLERANCE, place
        assert list(handle.report().values()).count("liger_kernel's") == 14 + 6 + 3
    assert differences(before, kept(model)) == []


def test_liger_s_ops_do_not_write_into_what_hooks_keep(stand_in, monkeypatch):
    monkeypatch.setattr(liger, "suits", lambda device: True)
    model, seen = fresh(), []
    layer = model.model.text_model.layers[0]
    for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.self_attn.q_proj, layer.self_attn.k_proj):
        module.register_forward_hook(lambda module, args, output: seen.append((output, output.detach().clone())))
    with idefics2_fast.patch(model):
        trained(model, inputs_of("text"))
    assert len(seen) == 4
    assert all(torch.equal(kept_output, as_given) for kept_output, as_given in seen)


def test_liger_s_ops_are_not_called_on_a_cpu(stand_in, model):
    inputs = inputs_of()
    expected = evaluated(model, inputs)
    with idefics2_fast.patch(model, attention=False, perceiver=False) as handle:
        assert torch.equal(evaluated(model, inputs), expected)
        assert "Hugging Face's: device cpu" in handle.report().values()
    assert CALLS == []


# The image processor.


@pytest.mark.parametrize("kind", ["Idefics2ImageProcessorPil", "Idefics2ImageProcessor"])
def test_the_image_processor(model, kind):
    import transformers
    from PIL import Image

    theirs = getattr(transformers, kind)(do_image_splitting=True, size={"shortest_edge": 50, "longest_edge": 120})
    processor = types.SimpleNamespace(image_processor=theirs)
    photo = Image.effect_mandelbrot((90, 130), (-3, -2.5, 2, 2.5), 50).convert("RGB")
    expected = theirs([[photo], [photo, photo]], return_tensors="pt")
    with idefics2_fast.patch(model, processor) as handle:
        ours = processor.image_processor([[photo], [photo, photo]], return_tensors="pt")
        assert type(processor.image_processor).__module__ == "idefics2_fast.image_processor"
        assert "C++" in handle.report()["processor.image_processor"]
    assert processor.image_processor is theirs
    levels = (ours["pixel_values"] - expected["pixel_values"]).abs().max() * 127.5
    assert torch.equal(ours["pixel_attention_mask"], expected["pixel_attention_mask"])
    assert levels < (0.01 if kind.endswith("Pil") else 2.5)
    with idefics2_fast.patch(model, processor, image_processor=False):
        assert processor.image_processor is theirs


def test_another_image_processor_is_left(model):
    processor = types.SimpleNamespace(image_processor=object())
    with idefics2_fast.patch(model, processor) as handle:
        assert handle.report()["processor.image_processor"] == "object, as it came"
    with pytest.raises(ValueError, match="image processor is a object"):
        idefics2_fast.patch(model, processor, strict=True)


def test_a_padded_batch_of_small_images_is_what_the_helper_makes():
    """Guards the comparisons above: several sizes, some rows without images, padding on both axes."""
    inputs = to_hf([sample([(56, 84)], TINY), sample([(98, 42)], TINY)])
    assert inputs["pixel_attention_mask"].flatten(2).sum(-1).tolist() == [[56 * 84], [98 * 42]]


def test_accelerate_s_mixed_precision_is_put_on_and_taken_off():
    """Its `unwrap_model` looks for the method beneath what it has wrapped."""
    accelerate = pytest.importorskip("accelerate")
    model = fresh()
    inputs = inputs_of()
    with torch.no_grad():
        expected = model.train()(**inputs).loss
    handle = idefics2_fast.patch(model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # another test's, kept for the process
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    with torch.no_grad():
        assert prepared(**inputs).logits is None
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    with torch.no_grad():
        output = unwrapped(**inputs)
    assert output.logits is None
    assert relative(output.loss, expected) <= TOLERANCE
    handle.undo()
    with torch.no_grad():
        output = unwrapped(**inputs)
    assert output.logits is not None
    assert relative(output.loss, expected) <= TOLERANCE
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_copies_of_patched_modules_are_undone_with_them():
    """PEFT copies a patched module where it trains it whole."""
    peft = pytest.importorskip("peft")
    model = fresh()
    inputs = inputs_of()
    handle = idefics2_fast.patch(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["modality_projection"]))
    twin = copy.deepcopy(wrapped)
    handle.undo()
    for each in (wrapped, twin):
        assert not any(True for module in each.modules() for _ in ledger.patched_names(module))
        with torch.no_grad():
            assert each.train()(**inputs).logits is not None
    idefics2_fast.patch(wrapped).undo()


def test_pixels_may_want_gradients():
    model = fresh()
    inputs = inputs_of()
    gradients = []
    for patched in (False, True):
        handle = idefics2_fast.patch(model) if patched else None
        pixels = inputs["pixel_values"].clone().requires_grad_()
        model(**inputs | {"pixel_values": pixels}).loss.backward()
        gradients.append(pixels.grad)
        if handle:
            handle.undo()
    mask = inputs["pixel_attention_mask"][:, :, None].bool()
    theirs, ours = (gradient * mask for gradient in gradients)
    assert relative(ours, theirs) <= TOLERANCE


def test_dora_in_evaluation_sees_what_is_written_past_autograd():
    """As callbacks that average weights write: `.data` leaves no trace on a tensor."""
    peft = pytest.importorskip("peft")
    inputs = inputs_of()
    model = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True))
    with idefics2_fast.patch(model):
        model.eval()
        evaluated(model, inputs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.add_(0.3)
        ours = evaluated(model, inputs)
    assert relative(ours, evaluated(model, inputs)) <= TOLERANCE


def test_a_saved_processor_knows_nothing_of_the_patch(tmp_path):
    from transformers import AutoProcessor

    write_processor(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path / "before")
    handle = idefics2_fast.patch(fresh(), processor)
    processor.save_pretrained(tmp_path / "patched")
    processor.image_processor.do_image_splitting = True
    handle.undo()
    assert processor.image_processor.do_image_splitting is True
    settings = [(tmp_path / name / "processor_config.json").read_text() for name in ("before", "patched")]
    assert "match" not in settings[1]
    assert settings[0].replace("ProcessorPil", "Processor") == settings[1].replace("ProcessorPil", "Processor")


def test_dora_alone_is_not_patched_twice():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    off = dict.fromkeys(("attention", "perceiver", "fused_linear_cross_entropy", "neftune", "rms_norm", "swiglu", "rope"), False)
    with idefics2_fast.patch(model, **off), pytest.raises(ValueError, match="patched already"):
        idefics2_fast.patch(model, **off)


def test_neftune_with_a_mask_that_does_not_tell_padding_is_transformers_own():
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = fresh()
    inputs = inputs_of("text")
    length = inputs["input_ids"].shape[1]
    mask = torch.zeros(inputs["input_ids"].shape[0], 1, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    registered = embedding.register_forward_hook(neftune_post_forward_hook)
    losses = []
    for patched in (False, True):
        handle = idefics2_fast.patch(model) if patched else None
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(model.train()(**inputs | {"attention_mask": mask}).loss)
        if handle:
            handle.undo()
    with idefics2_fast.patch(model, strict=True), pytest.raises(ValueError, match="does not tell padding"):
        model(**inputs | {"attention_mask": mask})
    registered.remove()
    del embedding.neftune_noise_alpha
    assert relative(losses[1], losses[0]) <= TOLERANCE


def test_blocks_of_rows_hide_nothing_from_hooks(monkeypatch):
    """Without gradients row-wise work runs in blocks on a CPU, but not where somebody watches."""
    from idefics2_fast import layers

    monkeypatch.setattr(layers, "ROWS", 8)
    model, inputs = fresh(), inputs_of()
    expected, seen = evaluated(model, inputs), []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2]))
        for module in (model.model.vision_model.encoder.layers[0].mlp.fc1, model.model.connector.modality_projection.gate_proj)
    ]
    with idefics2_fast.patch(model):
        assert relative(evaluated(model, inputs), expected) <= TOLERANCE
        assert min(seen) > 8
        for hook in hooks:
            hook.remove()
        assert relative(evaluated(model, inputs), expected) <= TOLERANCE
