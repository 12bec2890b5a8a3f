"""Somebody's own architecture, registered with transformers by their package: derived, certified and cut with no line of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from invariance import compress
from invariance.calibrate.derived import certify_derived
from invariance.io.layouts import derived_layout
from invariance.model.described.description import Kind


class HomemadeConfig(PretrainedConfig):
    model_type = "homemade"

    def __init__(
        self,
        vocab_size: int = 67,
        breadth: int = 16,
        channels: int = 24,
        num_hidden_layers: int = 2,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.breadth, self.channels = vocab_size, breadth, channels
        self.num_hidden_layers = num_hidden_layers
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class HomemadeLayer(nn.Module):
    """One head of attention and squared-ReLU channels with a gate, side by side; weights are bare parameters."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))
        for name in ("ask", "answer", "value", "out"):
            setattr(self, name, nn.Parameter(torch.randn(d, d) / d**0.5))
        self.open = nn.Parameter(torch.randn(n, d) / d**0.5)
        self.gate = nn.Parameter(torch.randn(n, d) / d**0.5)
        self.close = nn.Parameter(torch.randn(d, n) / n**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale
        q, k, v = h @ self.ask, h @ self.answer, h @ self.value
        near = torch.arange(x.shape[1], device=x.device)
        far = (near[:, None] - near[None]).to(x.dtype)
        scores = (q @ k.mT / x.shape[-1] ** 0.5 - 0.1 * far).masked_fill(far < 0, -torch.inf)
        mixed = scores.softmax(-1) @ v @ self.out
        channels = torch.relu(h @ self.open.T).square() * (h @ self.gate.T)
        return x + mixed + channels @ self.close.T


class HomemadeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HomemadeConfig

    def __init__(self, config: HomemadeConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.breadth)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(HomemadeLayer(config.breadth, config.channels) for _ in layers)
        self.lm_head = nn.Linear(config.breadth, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As the modules' own constructors do it."""

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(x))


@pytest.fixture(scope="module", autouse=True)
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Registered as a package of theirs would."""
    AutoConfig.register("homemade", HomemadeConfig, exist_ok=True)
    AutoModelForCausalLM.register(HomemadeConfig, HomemadeForCausalLM, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_an_architecture_that_no_library_knows_is_derived_certified_and_cut(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = HomemadeForCausalLM(HomemadeConfig()).eval()
    layout = derived_layout(model.config)
    kinds = {name: s.kind for name, s in layout.flat().spaces.items()}
    assert kinds["ch@0"] is Kind.PERM and kinds["vo@1"] is Kind.GL and kinds["qk@0"] is Kind.GL
    ids = torch.randint(3, 60, (8, 32))
    proof = certify_derived(model, layout, ids[:2])
    assert proof.certificate.passed and proof.accepted.unproven == []
    small = compress(model, recipe(tmp_path, ids))
    assert small.config.channels == 16 and model.config.channels == 24
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(again) is HomemadeForCausalLM
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, small(ids).logits, atol=1e-5)
    assert again.layers[0].gate.shape == (16, 16)


def recipe(folder: Any, ids: Tensor) -> dict[str, Any]:
    import numpy as np

    np.save(folder / "tokens.npy", ids.numpy())
    step = {
        "spaces": "mlp",
        "rotate": "permute",
        "select": {"uniform": {"width": 16}},
        "slice": "least_squares",
    }
    return {
        "model": "homemade",
        "calibrate": {"data": str(folder / "tokens.npy")},
        "steps": [step],
    }
