"""A Trainer with ElsaCallback on models that are no language models: 90 % of each constrained tensor, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from elsa_lightning import ElsaCallback
from elsa_lightning.lm.data import ResumableLoader, ResumableSampler
from tests.callbacks.tiny import assert_same_run, every_step, make_trainer

STEPS = 16


class Block(nn.Module):
    """A residual block with a bottleneck, a grouped convolution and squeeze-and-excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (x + y * self.fc(y.mean((2, 3))).sigmoid()[:, :, None, None]).relu()  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """As torchvision's, but tiny, on images ``(batch, 3, 8, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16), nn.Conv2d(16, 16, 3, groups=16), Block(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.bn1(self.conv1(x)).relu()).mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """A vision transformer without a name in common with others."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, 16, 2, stride=2), nn.Parameter(torch.zeros(1, 16, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.encoder(tokens).mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Rows of an image, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(24, 20, 2, batch_first=True, bidirectional=True), nn.GRU(40, 16, batch_first=True)
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.gru(self.lstm(x.transpose(1, 2).flatten(2))[0])[0][:, -1])  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A mixture of experts that reads pixels as tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        options = {
            "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 10,
            "intermediate_size": 24, "num_key_value_heads": 1, "num_experts": 4, "num_local_experts": 4,
            "pad_token_id": 0, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        }  # fmt: skip
        self.model = tf.AutoModelForCausalLM.from_config(config(**options))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=(x[:, 0, 0] * 4).long().clamp(-15, 15) + 16).logits[:, -1]  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Any, set[str]]] = {  # and what of the matrices stays dense
    "resnet": (ResNet, {"net.fc.weight", "layer1.1.weight"}),
    "attention": (Attention, {"head.weight", "places"}),
    "recurrent": (Recurrent, {"classifier.weight"}),
    "mixtral": (lambda: Experts(tf.MixtralConfig), {"lm_head.weight", "embed_tokens.weight", "gate.weight"}),
    "qwen3 moe": (lambda: Experts(tf.Qwen3MoeConfig), {"lm_head.weight", "embed_tokens.weight", "gate.weight"}),
}


class Classifier(LightningModule):
    """Somebody's module."""

    def __init__(self, name: str, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.net = MODELS[name][0]().to(memory_format=memory_format)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self) -> ResumableLoader:
        numbers = torch.Generator().manual_seed(0)
        images, labels = torch.randn(STEPS * 4, 3, 8, 8, generator=numbers), torch.arange(STEPS * 4) % 10
        data = TensorDataset(images, labels)
        sampler = ResumableSampler(data, num_replicas=1, rank=0, shuffle=True)
        return ResumableLoader(data, batch_size=4, sampler=sampler)


def fit(folder: Path, name: str, memory_format: torch.memory_format, resume: Path | None = None) -> Classifier:
    seed_everything(1, verbose=False)
    model = Classifier(name, memory_format)
    elsa = ElsaCallback(sparsity=0.9, interval=2)
    make_trainer(folder, elsa, every_step(folder), max_steps=STEPS).fit(model, ckpt_path=resume)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_each_constrained_tensor_ends_with_its_zeros_also_resumed(name: str, tmp_path: Path) -> None:
    memory_format = torch.channels_last if name == "resnet" else torch.contiguous_format
    model = fit(tmp_path / "whole", name, memory_format)
    dense = MODELS[name][1]
    constrained = {
        n: p for n, p in model.named_parameters() if p.dim() > 1 and not any(n.endswith(tail) for tail in dense)
    }
    assert len(constrained) >= 4
    for key, p in model.named_parameters():
        if key not in constrained:
            assert bool((p == 0).float().mean() < 0.5) or not p.any(), key
            continue
        for matrix in p if "experts" in key else p[None]:
            assert int((matrix != 0).sum()) >= 0.005 * matrix.numel(), key  # the floor
    entries = sum(p.numel() for p in constrained.values())
    kept = sum(int((p != 0).sum()) for p in constrained.values())
    assert kept == entries - round(0.9 * entries)
    fit(tmp_path / "resumed", name, memory_format, resume=tmp_path / "whole/9.ckpt")
    assert_same_run(tmp_path / f"whole/{STEPS}.ckpt", tmp_path / f"resumed/{STEPS}.ckpt")


class GAN(LightningModule):
    """Two networks with an optimizer each; the generator's weights are mostly of a kind that only patterns find."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        self.generator.register_parameter("mixing", nn.Parameter(torch.randn(64, 64)))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        fake = self.generator(batch[0][:, 0, 0, :4]) + self.generator.mixing[:8, 0]
        losses = -self.discriminator(fake).mean(), self.discriminator(fake.detach()).mean()
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        nets = self.generator, self.discriminator
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in nets], []

    train_dataloader = Classifier.train_dataloader


def test_one_network_of_a_gan_is_pruned_and_the_others_weights_are_not_spoken_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = GAN()
    before = {name: p.detach().clone() for name, p in model.generator.named_parameters()}
    elsa = ElsaCallback(sparsity=0.75, optimizer_index=1)
    make_trainer(tmp_path, elsa, max_steps=2 * STEPS).fit(model)
    assert not any("LOW COVERAGE" in str(w.message) for w in recwarn)
    assert sum(int((p != 0).sum()) for p in model.discriminator.parameters() if p.dim() == 2) == 36
    assert not any((p == 0).any() for name, p in model.generator.named_parameters() if before[name].all())
