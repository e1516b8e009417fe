"""PromptEncoder: unique prompts, bounded cache, clear errors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from dina_reward.families import Conditioning, get_family
from dina_reward.modeling import prompt_encoding
from dina_reward.modeling.prompt_encoding import PromptEncoder
from tests.tiny_models import tiny_sd_pipeline


class CountingFamily:
    """Encodes a prompt as its length and remembers what it was asked."""

    has_text_mask = False

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], **_: Any) -> Conditioning:
        self.calls.append(list(prompts))
        lengths = torch.tensor([[[float(len(prompt))]] for prompt in prompts])
        return Conditioning(lengths, lengths[:, 0])


def make(**kwargs: Any) -> tuple[PromptEncoder, CountingFamily]:
    family = CountingFamily()
    return PromptEncoder(family, object(), **kwargs), family  # type: ignore[arg-type]


def test_unique_prompts_are_encoded_once_in_one_call() -> None:
    encoder, family = make(batch_size=4)
    conditioning, index = encoder(["aa", "b", "aa", "ccc"])
    assert family.calls == [["aa", "b", "ccc", "ccc"]]
    assert conditioning.prompt_embeds.flatten().tolist() == [2, 1, 3]
    assert index.tolist() == [0, 1, 0, 2]
    encoder(["b", "dddd"])
    assert family.calls[1:] == [["dddd"] * 4]


def test_cache_is_bounded_and_least_recently_used_goes_first() -> None:
    encoder, family = make(cache_size=2, batch_size=1)
    encoder(["a", "b"])
    encoder(["a"])
    encoder(["c"])  # b goes
    encoder(["a", "c"])
    encoder(["b"])
    assert family.calls == [["a"], ["b"], ["c"], ["b"]]


def test_cache_can_be_off_and_cleared() -> None:
    encoder, family = make(cache_size=0)
    encoder(["a"])
    encoder(["a"])
    assert len(family.calls) == 2
    encoder, family = make()
    encoder(["a"])
    encoder.clear()
    encoder(["a"])
    assert len(family.calls) == 2


def test_every_call_has_one_number_of_rows() -> None:
    encoder, family = make(batch_size=2)
    encoder(["a", "bb", "ccc", "dddd", "eeeee"])
    assert family.calls == [["a", "bb"], ["ccc", "dddd"], ["eeeee", "eeeee"]]


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_an_encoding_does_not_depend_on_company(sd3_pipeline: Any, batch_size: int | None) -> None:
    prompts = [f"{number} red circles" for number in range(11)]
    options = {"max_sequence_length": 8, "cache_size": 0, "batch_size": batch_size}
    encoder = PromptEncoder(get_family("sd3"), sd3_pipeline, **options)  # type: ignore[arg-type]
    together, _ = encoder(prompts)
    for position, prompt in enumerate(prompts):
        for company in ([], ["x"], prompts[::-1]):
            other, index = encoder([*company, prompt])
            row, same = other[index[-1:]], together[position : position + 1]
            assert torch.equal(row.prompt_embeds, same.prompt_embeds)
            assert torch.equal(row.pooled_prompt_embeds, same.pooled_prompt_embeds)  # type: ignore[arg-type]


def test_encoders_whose_time_or_length_grows_encode_prompts_alone(sd3_pipeline: Any, monkeypatch: Any) -> None:
    assert PromptEncoder(get_family("sd3"), sd3_pipeline).batch_size == 8
    assert PromptEncoder(get_family("qwen_image"), sd3_pipeline).batch_size == 1
    monkeypatch.setattr(prompt_encoding, "_SMALL", 10)
    assert PromptEncoder(get_family("sd3"), sd3_pipeline).batch_size == 1


def test_what_one_thread_knows_is_not_given_to_others() -> None:
    encoder, _ = make(batch_size=1)
    known = Conditioning(torch.tensor([[[10.0]]]), torch.tensor([[1.0]]))
    with encoder.given(["aa"], known), ThreadPoolExecutor() as pool:
        assert pool.submit(encoder, ["aa"]).result()[0].prompt_embeds.tolist() == [[[2.0]]]
        assert encoder(["aa"])[0].prompt_embeds.tolist() == [[[10.0]]]


def test_real_pipeline_gets_the_limit(sd3_pipeline: Any) -> None:
    encoder = PromptEncoder(get_family("sd3"), sd3_pipeline, max_sequence_length=24)
    conditioning, _ = encoder(["a cat", "a dog"])
    assert conditioning.prompt_embeds.shape == (2, 77 + 24, 64)
    expected = sd3_pipeline.encode_prompt(
        "a dog", None, None, max_sequence_length=24, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(conditioning.prompt_embeds[1:], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conditioning.pooled_prompt_embeds[1:], expected[2], rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_errors() -> None:
    encoder, _ = make()
    with pytest.raises(ValueError, match="list of strings"):
        encoder("a cat")
    with pytest.raises(ValueError, match="list of strings"):
        encoder(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no text encoders"):
        PromptEncoder(get_family("sd3"), None)(["a"])
    with pytest.raises(ValueError, match="cache_size=0"):
        make(cache_size=-1)


def test_given_prompts_are_not_encoded() -> None:
    encoder, family = make(batch_size=1)
    known = Conditioning(torch.tensor([[[10.0]], [[20.0]], [[99.0]]]), torch.tensor([[1.0], [2.0], [9.0]]))
    with encoder.given(["aa", "b", "aa"], known):
        conditioning, index = encoder(["b", "ccc", "aa", "b"])
    assert family.calls == [["ccc"]]
    assert conditioning.prompt_embeds[index].flatten().tolist() == [20.0, 3.0, 10.0, 20.0]
    assert conditioning.pooled_prompt_embeds is not None
    assert conditioning.pooled_prompt_embeds[index].flatten().tolist() == [2.0, 3.0, 1.0, 2.0]
    encoder(["aa"])  # forgotten outside the context, and never cached
    assert family.calls == [["ccc"], ["aa"]]


def test_given_padding_is_cut_off_and_no_pipeline_is_needed() -> None:
    encoder = PromptEncoder(CountingFamily(), None)  # type: ignore[arg-type]
    mask = torch.tensor([[True, False, False], [True, True, False]])
    known = Conditioning(torch.arange(6.0).reshape(2, 3, 1), prompt_embeds_mask=mask)
    with encoder.given(["short", "long"], known):
        conditioning, _ = encoder(["short"])
        assert conditioning.prompt_embeds.tolist() == [[[0.0]]]
        assert encoder(["long", "short"])[0].prompt_embeds.shape == (2, 2, 1)
        with pytest.raises(ValueError, match="no text encoders"):
            encoder(["other"])
    with encoder.given(["short"], None), pytest.raises(ValueError, match="no text encoders"):
        encoder(["short"])


def train_one_token(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[-1, 0] += 1


def rewrite_by_data(pipeline: Any) -> None:
    for parameter in pipeline.text_encoder.parameters():
        parameter.data.mul_(0.5)


def add_lora(pipeline: Any) -> None:
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def weaken_lora(pipeline: Any) -> None:
    for layer in pipeline.text_encoder.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] /= 2


def invert_text(pipeline: Any) -> None:
    width = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    pipeline.load_textual_inversion({"<style>": torch.ones(1, width)}, token="<style>")


def test_encodings_are_forgotten_when_the_text_encoders_change() -> None:
    pipeline = tiny_sd_pipeline()
    encoder = PromptEncoder(get_family("stable_diffusion"), pipeline)
    encoder(["a <style>"])
    first = encoder._cache["a <style>"]
    encoder(["a <style>"])
    assert encoder._cache["a <style>"] is first
    for change in (train_one_token, rewrite_by_data, add_lora, weaken_lora, invert_text):
        before = encoder._cache["a <style>"]
        change(pipeline)
        encoder(["a <style>"])
        assert encoder._cache["a <style>"] is not before, change.__name__
    fresh, _ = PromptEncoder(get_family("stable_diffusion"), pipeline)(["a <style>"])
    assert torch.equal(encoder(["a <style>"])[0].prompt_embeds, fresh.prompt_embeds)


def test_an_encoder_can_be_copied() -> None:
    encoder, family = make()
    encoder(["a"])
    other = copy.deepcopy(encoder)
    assert other(["a"])[0].prompt_embeds.tolist() == [[[1.0]]]
    assert len(family.calls) == 1
