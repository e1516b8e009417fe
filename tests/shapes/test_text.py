import pytest
import torch

from dina_reward.shapes.prompts import ATTRIBUTES, all_scenes
from dina_reward.shapes.text import MAX_PROMPT_TOKENS, new_text_encoder, new_tokenizer, new_word_encoder


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


def tokenize(tokenizer, prompts):
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_every_attribute_value_is_one_token_and_stop_words_are_dropped(tokenizer):
    tokens = tokenizer.tokenize("A large Red circle on a white background")
    assert tokens == ["large", "red", "circle", "white"]
    values = [value for values in ATTRIBUTES.values() for value in values]
    assert [tokenizer.tokenize(value) for value in values] == [[value] for value in values]


def test_captions_fit_with_their_special_tokens(tokenizer):
    ids = tokenizer([scene.caption for scene in all_scenes()]).input_ids
    assert {len(row) for row in ids} == {MAX_PROMPT_TOKENS}


def test_unknown_words_become_one_token_each(tokenizer):
    assert tokenizer.tokenize("a large zebra, on Mars") == ["large", "<unk>", "<unk>", "<unk>"]
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_t5_prompts_start_without_bos():
    tokenizer = new_tokenizer(bos=False)
    assert tokenizer("red").input_ids[0] == tokenizer.convert_tokens_to_ids("red")


def test_text_encoders_are_seeded_and_frozen(tokenizer):
    first, again, other = (new_text_encoder(tokenizer, seed) for seed in (1, 1, 2))
    assert not any(parameter.requires_grad for parameter in first.parameters())
    for parameter, same in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, same)
    assert not torch.equal(first.text_projection.weight, other.text_projection.weight)


@torch.no_grad()
def test_pooled_embeddings_tell_all_attributes_of_held_out_scenes(tokenizer):
    encoder = new_text_encoder(tokenizer, seed=1)
    scenes = all_scenes()
    pooled = encoder(tokenize(tokenizer, [scene.caption for scene in scenes])).text_embeds.double()
    held_out = torch.tensor([scene.held_out for scene in scenes])
    indices = torch.tensor([scene.indices for scene in scenes])
    known, unknown = pooled[~held_out], pooled[held_out]
    ridge = torch.linalg.inv(known.T @ known + 0.1 * torch.eye(pooled.shape[1])) @ known.T
    for column in range(len(ATTRIBUTES)):
        targets = torch.nn.functional.one_hot(indices[~held_out, column]).double()
        predicted = (unknown @ ridge @ (targets - targets.mean(0))).argmax(dim=1)
        assert (predicted == indices[held_out, column]).float().mean() >= 0.9


@torch.no_grad()
def test_word_encoder_gives_zeros_for_padding_and_unit_scale_for_words():
    tokenizer = new_tokenizer(bos=False)
    states = new_word_encoder(tokenizer, seed=0)(tokenize(tokenizer, ["large red"])).last_hidden_state[0]
    assert torch.equal(states[3:], torch.zeros_like(states[3:]))
    torch.testing.assert_close(states[:3].square().mean(dim=1), torch.ones(3), rtol=1e-3, atol=0)
