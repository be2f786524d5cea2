"""transformers' common model tests, run on a small Idefics2. Its name keeps it from being collected: test_peers.py runs it."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Model
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

LATENTS = 2


class SmallIdefics2:
    """What the mixins ask a tester for: sizes, and inputs whose image tokens match their images."""

    # The mixins fill smaller batches up to seven samples with random tokens, and cut off the highest ids: no image token survives.
    batch_size, seq_length = 7, 10
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 100, 64, 2, 2
    image_token_id = 3
    is_training = True
    image_size, patch_size = 28, 14

    def get_config(self) -> Idefics2Config:
        vision = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        perceiver = {
            "hidden_size": self.hidden_size,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "num_key_value_heads": 1,
            "resampler_head_dim": 12,
        }
        text = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 56,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "sliding_window": 32,
            "pad_token_id": 0,
        }
        return Idefics2Config(
            vision_config=vision,
            perceiver_config=perceiver,
            text_config={"model_type": "mistral", **text},
            image_token_id=self.image_token_id,
            vocab_size=self.vocab_size,  # TrainingTesterMixin looks for it here
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Idefics2Config, dict[str, Any]]:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(self.image_token_id + 1, self.vocab_size, (self.batch_size, self.seq_length), generator=draw)
        ids[:, 3 : 3 + LATENTS] = self.image_token_id
        pixels = torch.rand(self.batch_size, 1, 3, self.image_size, self.image_size, generator=draw) * 2 - 1
        # Every other image is half as high, so that padding, masks and patch positions take part.
        real = torch.ones(self.batch_size, 1, self.image_size, self.image_size, dtype=torch.int64)
        real[::2, :, self.image_size // 2 :] = 0
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels * real[:, :, None],
            "pixel_attention_mask": real,
        }


class Suite(ModelTesterMixin):
    _is_composite = True
    additional_model_inputs = ("pixel_values", "pixel_attention_mask")

    def setUp(self) -> None:
        self.model_tester = SmallIdefics2()


class Idefics2ModelTest(Suite, unittest.TestCase):
    all_model_classes = (Idefics2Model,)


class Idefics2ForConditionalGenerationTest(Suite, TrainingTesterMixin, unittest.TestCase):
    """With tests of `generate` of our own: transformers' are not in its source distribution."""

    all_model_classes = (Idefics2ForConditionalGeneration,)
    test_generation_tester_mixin_inheritance = None

    def setUp(self) -> None:
        super().setUp()
        config, self.inputs = self.model_tester.prepare_config_and_inputs_for_common()
        torch.manual_seed(0)
        self.model = Idefics2ForConditionalGeneration(config).eval()
        self.model.generation_config.eos_token_id = None

    def generate(self, **settings: Any) -> Any:
        return self.model.generate(**{"max_new_tokens": 6, "do_sample": False, **self.inputs, **settings})

    def test_generate_greedy_is_the_argmax_of_forward(self) -> None:
        inputs = dict(self.inputs)
        for _ in range(6):
            best = self.model(**inputs, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], best], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
            with self.subTest(**settings):
                if "prompt_lookup_num_tokens" not in settings:
                    assert torch.equal(self.generate(**settings), inputs["input_ids"])
                else:  # one sample at a time
                    first = {name: tensor[:1] for name, tensor in self.inputs.items()}
                    assert torch.equal(self.generate(**first, **settings), inputs["input_ids"][:1])

    def test_generate_with_padding_on_the_left(self) -> None:
        pads = torch.zeros(self.inputs["input_ids"].shape[0], 3, dtype=torch.int64)
        padded = {name: torch.cat([pads, self.inputs[name]], 1) for name in ("input_ids", "attention_mask")}
        assert torch.equal(self.generate(**padded)[:, 3:], self.generate())

    def test_generate_beams_score_no_less_than_greedy(self) -> None:
        def score(tokens: torch.Tensor) -> torch.Tensor:
            inputs = {**self.inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            chances = self.model(**inputs).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            return chances[:, self.inputs["input_ids"].shape[1] - 1 :].sum(1)

        answer = self.generate(num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True)
        scores = score(answer.sequences[::2])
        torch.testing.assert_close(scores / 6, answer.sequences_scores[::2], rtol=1e-4, atol=1e-5)
        assert scores.sum() >= score(self.generate()).sum()

    def test_generate_samples_by_its_seed(self) -> None:
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(self.generate(do_sample=True, top_k=20, temperature=3.0))
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_generate_returns_what_is_asked_for(self) -> None:
        length, layers = self.inputs["input_ids"].shape[1], self.model_tester.num_hidden_layers
        self.model.set_attn_implementation("eager")
        asked = {"output_logits": True, "output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
        answer = self.generate(**asked)
        assert len(answer.logits) == len(answer.hidden_states) == len(answer.attentions) == 6
        assert [tuple(h.shape) for h in answer.hidden_states[0]] == [(7, length, 64)] * (layers + 1)
        assert [tuple(a.shape) for a in answer.attentions[0]] == [(7, 2, length, length)] * layers
        assert [tuple(a.shape) for a in answer.attentions[5]] == [(7, 2, 1, length + 5)] * layers

    def test_generate_continues_from_a_cache(self) -> None:
        whole = self.generate(max_new_tokens=8)
        half = self.generate(max_new_tokens=4, return_dict_in_generate=True)
        rest = self.model.generate(input_ids=half.sequences, past_key_values=half.past_key_values, max_new_tokens=4, do_sample=False)
        assert torch.equal(rest, whole)
