"""Encoders, two towers, encoder with decoder: the same derivation, from examples of any inputs."""

from __future__ import annotations

import pytest
import torch
from derive_models import check, found, integers, normal
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from invariance.model.derive import Kind
from invariance.model.tiny import random_weights, untie

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**SHAPE, "intermediate_size": 40}
IMAGE = {"image_size": 32, "patch_size": 8}


def ready(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("eager")
    model = model.double().eval()
    random_weights(model, 0)
    return model


def pixels(seed: int) -> dict:
    return {"pixel_values": normal(2, 3, 32, 32, seed=seed)}


def test_vit_keeps_rotations_that_fix_the_ones_and_gl_in_heads() -> None:
    torch.manual_seed(0)
    _, certificate = check(ready(ViTForImageClassification(ViTConfig(**MLP, **IMAGE))), pixels)
    assert certificate.passed and not certificate.refuted
    assert found(certificate) == {
        ("residual", Kind.O1, 32): 1,
        ("qk", Kind.GL, 8): 8,
        ("vo", Kind.GL, 8): 8,
        ("ch", Kind.PERM, 40): 2,
        ("heads", Kind.NODES, 4): 2,
    }


def test_a_vit_that_has_learnt_digits_is_certified_on_what_it_learnt() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    values, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(values).float().reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(labels)
    torch.manual_seed(0)
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    model = ViTForImageClassification(ViTConfig(**MLP, **shape))
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        batch = torch.randint(0, 1500, (64,))
        optimizer.zero_grad()
        model(pixel_values=images[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    right = model(pixel_values=images[1500:]).logits.argmax(-1) == labels[1500:]
    assert right.float().mean() > 0.6  # a tenth by chance
    seen = images.double()
    _, certificate = check(
        model.double(), lambda seed: {"pixel_values": seen[2 * seed : 2 * seed + 2]}
    )
    assert certificate.passed and not certificate.refuted
    assert ("residual", Kind.O1, 32) in found(certificate)


def test_dinov2_has_scales_on_what_layers_write_so_its_stream_is_permuted() -> None:
    torch.manual_seed(0)
    model = ready(Dinov2ForImageClassification(Dinov2Config(**SHAPE, **IMAGE, mlp_ratio=2)))
    own, certificate = check(model, pixels)
    assert certificate.passed and own.unseen == ("dinov2.embeddings.mask_token",)
    assert ("residual", Kind.PERM, 32) in found(certificate)
    assert all("layer_scale" in name for name in own.unfolded)


def test_clip_has_a_stream_for_each_side_and_a_rotation_of_the_common_space() -> None:
    text = {**MLP, "vocab_size": 67, "max_position_embeddings": 32, "eos_token_id": 66}
    config = CLIPConfig(text_config=text, vision_config={**MLP, **IMAGE}, projection_dim=24)
    end = torch.full((2, 1), 66)

    def example(seed: int) -> dict:
        ids = torch.cat([integers(2, 10, seed=seed), end], 1)
        return {"input_ids": ids, **pixels(seed)}

    torch.manual_seed(0)
    own, certificate = check(ready(CLIPModel(config)), example)
    assert certificate.passed and not certificate.refuted and not own.unseen
    blocks = found(certificate)
    assert ("residual", Kind.O1, 32) in blocks and ("inner", Kind.O, 24) in blocks
    assert blocks[("vo", Kind.GL, 8)] == blocks[("qk", Kind.GL, 8)] == 16


def test_whisper_has_cross_attention_and_a_decoder_that_rotates() -> None:
    config = WhisperConfig(
        vocab_size=67,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_mel_bins=16,
        max_source_positions=30,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )

    def example(seed: int) -> dict:
        tokens = integers(2, 9, seed=seed)
        sound = normal(2, 16, 60, seed=seed)
        return {"input_features": sound, "decoder_input_ids": tokens, "use_cache": False}

    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach().clone())
    own, certificate = check(ready(model), example)
    assert certificate.passed and not certificate.refuted and not own.unseen
    blocks = found(certificate)
    assert blocks[("residual", Kind.O1, 32)] == 1  # the decoder's
    assert blocks[("residual", Kind.PERM, 32)] == 1  # the encoder's begins behind a GELU
    assert blocks[("vo", Kind.GL, 8)] == 6 * 4


def test_t5_has_a_stream_that_rotates() -> None:
    config = T5Config(
        vocab_size=67,
        d_model=32,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )

    def example(seed: int) -> dict:
        decoder = integers(2, 9, seed=seed + 50)
        return {
            "input_ids": integers(2, 12, seed=seed),
            "decoder_input_ids": decoder,
            "use_cache": False,
        }

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    untie(model)
    own, certificate = check(ready(model), example)
    assert certificate.passed and not certificate.refuted and not own.unseen
    # one table of tokens serves both streams, so they are one space
    assert found(certificate)[("residual", Kind.O, 32)] == 1


def test_bert_is_post_norm_so_its_stream_is_permuted() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**MLP, vocab_size=67, max_position_embeddings=64))
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())

    def example(seed: int) -> dict:
        return {"input_ids": integers(2, 12, seed=seed), "attention_mask": torch.ones(2, 12)}

    _, certificate = check(ready(model), example)
    assert certificate.passed and not certificate.refuted
    blocks = found(certificate)
    assert ("residual", Kind.PERM, 32) in blocks and blocks[("vo", Kind.GL, 8)] == 8
    assert not any(k in (Kind.O, Kind.O1) for _, k, _ in blocks)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_never_folded_into(tied: bool) -> None:
    """With one table for tokens and logits, the last gain has no reader of its own."""
    config = BertConfig(**MLP, vocab_size=67, max_position_embeddings=64, tie_word_embeddings=tied)
    torch.manual_seed(0)

    def example(seed: int) -> dict:
        return {"input_ids": integers(2, 12, seed=seed), "attention_mask": torch.ones(2, 12)}

    own, certificate = check(ready(BertForMaskedLM(config)), example)
    last = "cls.predictions.transform.LayerNorm.weight"
    assert certificate.folding <= 1e-12 and (last in own.unfolded) is tied
