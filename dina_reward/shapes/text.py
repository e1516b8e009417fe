"""Word-level tokenizers and frozen random text encoders for the shapes world."""

from __future__ import annotations

from itertools import chain

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from .prompts import ATTRIBUTES


MAX_PROMPT_TOKENS = 6
"""Length to which prompts are padded or cut in all three text streams: a caption takes four and two special tokens."""

HIDDEN_SIZE = 64
PROJECTION_SIZE = 64

EMBEDDING_STD = {"token_embedding": 1.0, "position_embedding": 0.5}
"""Deviation of the random embeddings; the other matrices get 1 / sqrt(width)."""

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
STOP_WORDS = ("a", "an", "the", "on", "background")
"""Words that tell nothing; the tokenizers drop them, so that a caption takes four tokens and the text stream is short."""


def new_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each attribute value; stop words are dropped, other words become `<unk>`.

    Args:
        bos (bool): whether a prompt starts with `<bos>`, as for CLIP; for T5 it does not.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *chain(*ATTRIBUTES.values())))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(rf"\b({'|'.join(STOP_WORDS)})\b"), "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if bos else "$A <eos>",
        special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<eos>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_PROMPT_TOKENS,
        padding_side="right",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def new_text_encoder(
    tokenizer: PreTrainedTokenizerFast, seed: int, projection: bool = True
) -> CLIPTextModelWithProjection | CLIPTextModel:
    """A frozen random text encoder whose outputs tell every word and its place apart.

    Word embeddings get unit variance and the linear layers unit gain, far more than the usual initialisation, so that
    attention mixes the words strongly and captions that differ in one word have clearly different pooled embeddings.

    Args:
        tokenizer (PreTrainedTokenizerFast): gives the vocabulary.
        seed (int): seeds the weights.
        projection (bool): whether there is a projected pooled output, as Stable Diffusion 3 needs and 1.x does not.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_PROMPT_TOKENS,
        projection_dim=PROJECTION_SIZE,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim == 2:
                std = EMBEDDING_STD.get(name.rsplit(".", 2)[-2], HIDDEN_SIZE**-0.5)
                parameter.normal_(std=std, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    return encoder.eval().requires_grad_(False)


def new_word_encoder(tokenizer: PreTrainedTokenizerFast, seed: int) -> T5EncoderModel:
    """A T5 encoder without layers: normalised random word embeddings, zero for padding.

    Zeros for padding make prompts padded to any length nearly the same to the transformer.

    Args:
        tokenizer (PreTrainedTokenizerFast): gives the vocabulary.
        seed (int): seeds the weights.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * HIDDEN_SIZE,
        num_layers=0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = T5EncoderModel(config)
    with torch.no_grad():
        encoder.shared.weight.normal_(generator=torch.Generator().manual_seed(seed))
        encoder.shared.weight[tokenizer.pad_token_id] = 0
    return encoder.eval().requires_grad_(False)
