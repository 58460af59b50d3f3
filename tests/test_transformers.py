"""Models of Hugging Face's transformers as they come, from small configurations: masked, trained, saved, packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spartan
from spartan import Sparsifier, Spartan
from spartan.nn import PackedLayer

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {**_SMALL, "vocab_size": 48, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_DENSE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 48, "n_positions": 16, "bos_token_id": 0}
_GPT2.update(eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # type: ignore[arg-type]
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 48, "dropout_rate": 0.0}


def _tokens() -> dict[str, torch.Tensor]:
    tokens = torch.randint(2, 48, (4, 8))
    return {"input_ids": tokens, "labels": tokens}


def _images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4) % 3}


def _bert() -> Any:
    config = transformers.BertConfig(**_TEXT, **_DENSE, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def _mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_TEXT, num_key_value_heads=1, num_local_experts=4)
    )


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, num_key_value_heads=1))


def _vit() -> Any:
    config = transformers.ViTConfig(**_SMALL, **_DENSE, image_size=32, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config)


def _resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config)


def _labels_of_sentences() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(2, 48, (4, 8)), "labels": torch.arange(4) % 3}


# name -> model, batch, settings of the Sparsifier, head, how many weights are masked
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]], dict[str, Any], str, int]] = {
    "bert": (_bert, _labels_of_sentences, {}, "classifier.weight", 13),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2)),
        _tokens,
        {},
        "transformer.wte.weight",
        8,
    ),
    "llama": (_llama, _tokens, {}, "lm_head.weight", 14),
    "vit": (_vit, _images, {}, "classifier.weight", 13),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5, decoder_start_token_id=0)),
        _tokens,
        {},
        "shared.weight",
        32,
    ),
    "mixtral": (_mixtral, _tokens, {"include": ["*.experts.*", "*_proj.weight"]}, "lm_head.weight", 12),
    "resnet": (_resnet, _images, {}, "classifier.1.weight", 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_to_its_sparsity_is_saved_meanwhile_and_packed(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, batch, settings, head, count = MODELS[name]
    model = make()
    plain = copy.deepcopy(model)
    method = Spartan(sparsity=0.7, block_size=(8, 8))
    sparsifier = Sparsifier(model, method, 8, count="masked", **settings)
    assert len(sparsifier.masks()) == count and head not in sparsifier.masks()
    if not settings:
        assert "head" in sparsifier.skipped[head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier.attach(optimizer)
    for step in range(8):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        assert bool(torch.isfinite(loss))
        if step == 4:  # as a trainer's checkpoint does
            model.save_pretrained(tmp_path / "checkpoint")
            assert list(model.state_dict()) == list(plain.state_dict())
    again, info = type(plain).from_pretrained(tmp_path / "checkpoint", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert list(again.state_dict()) == list(plain.state_dict())
    masked = list(sparsifier.masks())
    sparsifier.finalize()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    zeros = sum(int((model.get_parameter(key) == 0).sum()) for key in masked)
    total = sum(model.get_parameter(key).numel() for key in masked)
    assert abs(zeros - 0.7 * total) <= 64
    model.eval()
    example = {key: value for key, value in batch().items()}
    expected = model(**example).loss
    spartan.save_pretrained(model, tmp_path / "checkpoint")  # beside Hugging Face's files
    assert type(plain).from_pretrained(tmp_path / "checkpoint") is not None
    fresh = spartan.load_pretrained(make().eval(), tmp_path / "checkpoint")
    assert torch.equal(fresh(**example).loss, expected)
    report = spartan.packing_report(model, 8)
    assert all(row.reason for row in report.rows if row.block_size is None)
    packable = [row for row in report.rows if row.reason is None]
    spartan.to_block_sparse(model, 8)
    assert sum(isinstance(module, PackedLayer) for module in model.modules()) == len(packable)
    assert packable
    torch.testing.assert_close(model(**example).loss, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_in_the_middle_holds_the_trained_weights_of_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2))
    include = ["*.c_attn.weight", "transformer.wte.weight"]  # the table is tied to the head
    sparsifier = Sparsifier(model, Spartan(sparsity=0.5), 10, include=include, count="masked")
    for _ in range(5):
        sparsifier.step()
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    trained = dict(model.named_parameters())
    for key, value in again.named_parameters():
        assert torch.equal(value, trained[key]), key
    assert again.lm_head.weight is again.transformer.wte.weight
    with pytest.raises(AttributeError, match=r"transformer\.wte\.weight"):  # as the documentation says: tied already
        model.tie_weights()
    sparsifier.finalize()
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_an_encoder_without_a_head_is_masked_to_its_last_layer() -> None:
    for model, last in (
        (transformers.BertModel(transformers.BertConfig(**_TEXT)), "pooler.dense.weight"),
        (
            transformers.BertModel(transformers.BertConfig(**_TEXT), add_pooling_layer=False),
            "encoder.layer.1.output.dense.weight",
        ),
        (transformers.T5EncoderModel(transformers.T5Config(**_T5)), "encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        (transformers.GPT2Model(transformers.GPT2Config(**_GPT2)), "h.1.mlp.c_proj.weight"),
    ):
        sparsifier = Sparsifier(model, spartan.OneShot(sparsity=0.1), 4, count="masked")
        assert list(sparsifier.masks())[-1] == last
        assert not [why for why in sparsifier.skipped.values() if "head" in why]
        if not isinstance(model, transformers.GPT2Model):  # which has no Linear at all
            assert "no head" in str(sparsifier.report())


def test_experts_are_masked_one_by_one() -> None:
    torch.manual_seed(0)
    model = _mixtral()
    sparsifier = Sparsifier(model, spartan.GMP(pattern=(2, 4)), 4, include="*.experts.*")
    assert {mask.hard.dim() for mask in sparsifier.masks().values()} == {3}
    sparsifier.finalize()
    for name, weight in model.named_parameters():
        if ".experts." in name:
            assert bool(((weight != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all())
