"""Saved pipelines that transformers 4 and 5 read alike."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from dina_reward.shapes import load_pipeline, weights_dir
from dina_reward.shapes.portable import make_portable
from dina_reward.shapes.text import new_tokenizer, new_word_encoder


NEW = "TokenizersBackend"


@pytest.mark.parametrize("world", ["flow", "ddpm"])
def test_shipped_pipelines_are_portable(world):
    """Where this fails after a build: `python -m dina_reward.shapes.portable` on the directory."""
    directory = weights_dir(world)
    assert not [path for path in directory.rglob("*.json") if NEW in path.read_text()]
    if world == "ddpm":
        assert all(name.startswith("text_model.") for name in load_file(directory / "text_encoder/model.safetensors"))


def test_what_transformers_5_writes_becomes_portable(tmp_path):
    made = tmp_path / "ddpm"
    shutil.copytree(weights_dir("ddpm"), made)
    encoder = made / "text_encoder" / "model.safetensors"
    before = load_file(encoder)
    save_file({name.removeprefix("text_model."): tensor for name, tensor in before.items()}, encoder)
    index, tokenizer = (made / name for name in ("model_index.json", "tokenizer/tokenizer_config.json"))
    for path in (index, tokenizer):
        path.write_text(path.read_text().replace("PreTrainedTokenizerFast", NEW))
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "backend": "tokenizers"}))
    for _ in range(2):
        make_portable(made)
        after = load_file(encoder)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        for path in (index, tokenizer):
            assert path.read_text() == (weights_dir("ddpm") / path.relative_to(made)).read_text()


def test_an_encoder_without_layers_gets_one_that_adds_nothing(tmp_path):
    directory = tmp_path / "flow"
    (directory / "text_encoder_3").mkdir(parents=True)
    (directory / "model_index.json").write_text(json.dumps({"text_encoder_3": ["transformers", "T5EncoderModel"]}))
    encoder = new_word_encoder(new_tokenizer(bos=False), seed=0)
    encoder.save_pretrained(directory / "text_encoder_3")
    make_portable(directory)
    made, report = T5EncoderModel.from_pretrained(directory / "text_encoder_3", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = torch.tensor([[4, 9, 2, 0], [1, 2, 3, 5]])
    assert torch.equal(made(words)[0], encoder(words)[0])


def test_the_text_encoder_has_its_own_weights():
    stored = load_file(weights_dir("ddpm") / "text_encoder" / "model.safetensors")
    encoder = load_pipeline("ddpm").text_encoder
    weight = encoder.get_input_embeddings().weight
    assert torch.equal(weight, stored["text_model.embeddings.token_embedding.weight"].float())
