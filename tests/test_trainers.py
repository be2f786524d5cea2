"""Hugging Face's Trainer and TRL's SFTTrainer on a patched model, against the same run without the patch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import idefics2_fast
from idefics2_fast import Idefics2Config
from idefics2_fast.benchmarks.local_checkpoint import CHAT_TEMPLATE, random_model

LATENTS = 4
SPECIAL = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
# Of a loss after several steps in fp32: the bound on outputs.
LOSS = 2e-5
# bf16 keeps 8 bits. A loss of either run is off by about one unit of them.
BF16_LOSS = 2.0**-7
EVERY_LINEAR = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
STEPS = 5


@pytest.fixture(scope="module")
def processor() -> Any:
    """transformers' own, for images of 28 to 84 pixels a side and text of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Idefics2Processor, PreTrainedTokenizerFast
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    names = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    images = Idefics2ImageProcessorPil(do_image_splitting=False, size={"shortest_edge": 28, "longest_edge": 84})
    text = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)
    return Idefics2Processor(images, text, image_seq_len=LATENTS, chat_template=CHAT_TEMPLATE)


def photo(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversation(question: str, answer: str, images: list[Image.Image]) -> dict[str, Any]:
    asked = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return {"messages": messages, "images": images}


@pytest.fixture(scope="module")
def conversations() -> list[dict[str, Any]]:
    """One image or two, of several sizes; questions and answers of several lengths."""
    sizes = [[(60, 80)], [(30, 90), (84, 40)], [(50, 50)], [(84, 84), (28, 28)], [(33, 77)], [(28, 84), (84, 28)]]
    return [
        conversation("What is this? " * (1 + i % 3), "A thing of many colours. " * (1 + (i + 1) % 4), [photo(*s, seed=i) for s in size])
        for i, size in enumerate(sizes)
    ]


def collator(processor: Any, padding_side: str = "left") -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Padded batches whose labels are the answers'."""

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [processor.apply_chat_template(sample["messages"]) for sample in samples]
        images = [sample["images"] for sample in samples]
        batch = processor(text=texts, images=images, padding=True, padding_side=padding_side, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, sample in zip(labels, samples, strict=True):
            answer = processor.tokenizer(sample["messages"][1]["content"][0]["text"], add_special_tokens=False)["input_ids"]
            real = (row != -100).nonzero()[:, 0]
            row[: real[-1] + 1 - len(answer) - 2] = -100
        return {**batch, "labels": labels}

    return collate


def small_model() -> nn.Module:
    """The tiny size with the processor's tokens."""
    config = Idefics2Config.named("tiny").to_hf()
    config["text_config"]["vocab_size"] = len(SPECIAL) + 256
    config["perceiver_config"]["resampler_n_latents"] = LATENTS
    config["image_token_id"] = SPECIAL.index("<image>")
    return random_model(Idefics2Config.from_hf(config), seed=1)


def adapted(model: nn.Module, use_dora: bool, dropout: float = 0.0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=8, lora_alpha=16, use_dora=use_dora, lora_dropout=dropout, target_modules=EVERY_LINEAR, init_lora_weights=False)
    return get_peft_model(model, config)


def arguments(folder: Path, **settings: Any) -> Any:
    from transformers import TrainingArguments

    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1} | settings
    settings = {"save_strategy": "no", "report_to": [], "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True} | settings
    return TrainingArguments(str(folder), seed=5, **settings)


def trainer_of(model: nn.Module, folder: Path, processor: Any, data: list[Any], padding_side: str = "left", **settings: Any) -> Any:
    from transformers import Trainer

    return Trainer(
        model, arguments(folder, **settings), data_collator=collator(processor, padding_side), train_dataset=data, eval_dataset=data
    )


def losses(trainer: Any) -> Tensor:
    """[steps, 2]: loss and gradient norm."""
    return torch.tensor([[log["loss"], log["grad_norm"]] for log in trainer.state.log_history if "loss" in log], dtype=torch.float64)


@pytest.fixture
def train(tmp_path: Path, processor: Any, conversations: list[Any]) -> Iterator[Callable[..., Any]]:
    """Trains a model, with the patch or without, and gives the trainer."""
    handles = []

    def run(model: nn.Module, patched: bool, patch: dict[str, Any] | None = None, **settings: Any) -> Any:
        if patched:
            handles.append(idefics2_fast.patch(model, **(patch or {})))
        trainer = trainer_of(model, tmp_path / str(patched), processor, conversations, **settings)
        trainer.train()
        return trainer

    yield run
    for handle in handles:
        handle.undo()


def assert_same_curve(ours: Any, theirs: Any, bound: float = LOSS) -> None:
    ours, theirs = losses(ours), losses(theirs)
    assert len(theirs) > 1
    assert len(ours) == len(theirs)
    assert theirs[:, 0].unique().numel() == len(theirs), "it does not learn"
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=bound)
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=5 * bound)


SETTINGS = {
    "as it comes": {},
    "padding on the right": {"padding_side": "right"},
    "accumulation": {"gradient_accumulation_steps": 3},
    "reentrant checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "label smoothing": {"label_smoothing_factor": 0.1},
}


slow = pytest.mark.slow


@pytest.mark.parametrize("name", [name if name == "as it comes" else pytest.param(name, marks=slow) for name in SETTINGS])
def test_the_loss_curve(train: Callable[..., Any], name: str) -> None:
    theirs, ours = (train(small_model(), patched, **SETTINGS[name]) for patched in (False, True))
    assert_same_curve(ours, theirs)


@pytest.mark.parametrize(
    "name", ["as it comes", *(pytest.param(name, marks=slow) for name in ("accumulation", "reentrant checkpointing", "checkpointing"))]
)
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_loss_curve_of_adapters(train: Callable[..., Any], use_dora: bool, name: str) -> None:
    theirs, ours = (train(adapted(small_model(), use_dora), patched, **SETTINGS[name]) for patched in (False, True))
    assert_same_curve(ours, theirs)
    for (name, a), (_, b) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_accumulated_steps_count_all_their_tokens(train: Callable[..., Any]) -> None:
    """Three batches of two with answers of other lengths are one batch of six: `num_items_in_batch` reaches the loss."""
    one = train(small_model(), True, per_device_train_batch_size=6, max_steps=2)
    many = train(small_model(), True, gradient_accumulation_steps=3, max_steps=2)
    np.testing.assert_allclose(losses(many)[:, 0], losses(one)[:, 0], rtol=LOSS)


@pytest.mark.slow
def test_bf16_autocast(train: Callable[..., Any]) -> None:
    theirs, ours = (train(adapted(small_model(), True), patched, bf16=True) for patched in (False, True))
    np.testing.assert_allclose(losses(ours)[:, 0], losses(theirs)[:, 0], rtol=BF16_LOSS)


@pytest.mark.parametrize("length", ["document", "padded"])
def test_neftune(tmp_path: Path, processor: Any, conversations: list[Any], length: str) -> None:
    """Noise as large as the length says, none on padding, none in evaluation, and no hook after the training."""
    from transformers import TrainerCallback

    alpha, seen = 5.0, []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            embedding = model.get_input_embeddings()
            self.hook = embedding.register_forward_hook(lambda module, args, out: seen.append((args[0], out - module.weight[args[0]])))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.hook.remove()

    model = small_model()
    with idefics2_fast.patch(model, neftune_length=length):
        trainer = trainer_of(model, tmp_path, processor, conversations, neftune_noise_alpha=alpha, max_steps=3)
        trainer.add_callback(Watch())
        trainer.train()
        assert not model.get_input_embeddings()._forward_hooks
        assert len(seen) == 3
        for ids, noise in seen:
            real = ids != processor.tokenizer.pad_token_id
            for row, there in zip(noise.detach(), real, strict=True):
                rows = int(there.sum()) if length == "document" else len(there)
                bound = alpha / math.sqrt(rows * row.shape[-1])
                assert not row[~there].any()
                assert row.abs().max() <= bound * 1.001
                words = row[there].flatten()
                assert abs(words.std() / (bound / math.sqrt(3)) - 1) < 4 / math.sqrt(len(words))
        assert not torch.equal(seen[0][1], seen[1][1])
        before = len(seen)
        trainer.evaluate()
        assert len(seen) == before


@pytest.mark.parametrize("use_dora", [pytest.param(False, marks=slow), True], ids=["model", "DoRA"])
def test_what_is_saved_loads_without_the_patch(train: Callable[..., Any], tmp_path: Path, use_dora: bool) -> None:
    from peft import PeftModel
    from transformers import Idefics2ForConditionalGeneration

    theirs, ours = (train(adapted(small_model(), True) if use_dora else small_model(), patched, max_steps=2) for patched in (False, True))
    for trainer, name in ((theirs, "theirs"), (ours, "ours")):
        trainer.save_model(str(tmp_path / name))
    files = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("theirs", "ours")}
    assert files["ours"] == files["theirs"]
    for file in files["ours"]:
        if file.endswith(".json"):
            assert (tmp_path / "ours" / file).read_text() == (tmp_path / "theirs" / file).read_text()
    if use_dora:
        loaded = PeftModel.from_pretrained(small_model(), tmp_path / "ours")
    else:
        loaded = Idefics2ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    expected = ours.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.slow
def test_resuming_gives_the_same_bits(tmp_path: Path, processor: Any, conversations: list[Any]) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "data_seed": 1}
    curves = []
    for resume in (False, True):
        with idefics2_fast.patch(model := adapted(small_model(), True)):
            trainer = trainer_of(model, tmp_path, processor, conversations, **settings)
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
            curves.append(losses(trainer))
    assert torch.equal(*curves)


def test_evaluation_has_logits(tmp_path: Path, processor: Any, conversations: list[Any]) -> None:
    def metrics(prediction: Any) -> dict[str, float]:
        right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": right[prediction.label_ids[:, 1:] != -100].mean()}

    def best(outputs: Any, labels: Tensor) -> Tensor:
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        assert logits.shape == (*labels.shape, len(SPECIAL) + 256)
        return logits.argmax(-1)

    answers = []
    for patched in (False, True):
        model = small_model()
        handle = idefics2_fast.patch(model) if patched else None
        trainer = trainer_of(model, tmp_path, processor, conversations, per_device_eval_batch_size=3)
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = metrics, best
        answers.append(trainer.evaluate())
        if handle:
            handle.undo()
    theirs, ours = answers
    assert ours["eval_accuracy"] == theirs["eval_accuracy"]
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=LOSS)


def sft(model: nn.Module, folder: Path, processor: Any, data: Any, **settings: Any) -> Any:
    """TRL's trainer after three steps."""
    from trl import SFTConfig, SFTTrainer

    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "max_length": None} | settings
    settings = {"save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True} | settings
    trainer = SFTTrainer(model, SFTConfig(str(folder), seed=5, **settings), train_dataset=data, processing_class=processor)
    trainer.train()
    return trainer


def assert_sft_runs_alike(model: Callable[[], nn.Module], *args: Any, **settings: Any) -> None:
    theirs = sft(model(), *args, **settings)
    with idefics2_fast.patch(patched := model()):
        ours = sft(patched, *args, **settings)
    assert_same_curve(ours, theirs)
    accuracies = [[log["mean_token_accuracy"] for log in trainer.state.log_history if "loss" in log] for trainer in (ours, theirs)]
    assert accuracies[0] == accuracies[1]


SFT_SETTINGS = {
    "as it comes": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "no checkpointing": {"activation_checkpointing": False},
    "loss of answers": {"completion_only_loss": True},
}


@pytest.mark.parametrize("name", [name if name == "as it comes" else pytest.param(name, marks=slow) for name in SFT_SETTINGS])
@pytest.mark.parametrize("use_dora", [pytest.param(False, marks=slow), True], ids=["model", "DoRA"])
def test_sft_trainer(tmp_path: Path, processor: Any, conversations: list[Any], name: str, use_dora: bool) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    turns = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    rows = conversations
    if name == "loss of answers":
        rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]} for row in rows]
    data = Dataset.from_list(rows, features=Features({key: List(Picture()) if key == "images" else turns for key in rows[0]}))
    model = (lambda: adapted(small_model(), True)) if use_dora else small_model
    assert_sft_runs_alike(model, tmp_path, processor, data, **SFT_SETTINGS[name])


@slow
@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 64}, {"padding_free": True}], ids=["packing", "padding_free"])
def test_sft_trainer_on_text_without_padding(tmp_path: Path, processor: Any, settings: dict[str, Any]) -> None:
    """Documents one after another in a row, told apart by their positions; TRL does this for text alone."""
    from datasets import Dataset

    data = Dataset.from_dict({"text": ["A thing of many colours. " * n for n in (1, 3, 2, 1, 2, 4)]})
    assert_sft_runs_alike(small_model, tmp_path, processor.tokenizer, data, **settings)
