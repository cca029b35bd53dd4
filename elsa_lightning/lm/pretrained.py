"""Pretrained: where a Hugging Face causal language model comes from, and how it is built and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.lm import EMBEDDED_MODEL, model_path
from elsa_lightning.lm.sharded import build_sharded, fill
from elsa_lightning.lm.supported import decoder_config


@dataclass(frozen=True)
class Pretrained:
    """A causal language model in a folder or on the hub.

    Args:
        name: Hub name, folder, or the embedded model.
        option: The option that names it, for messages.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run model code from the hub.
        attn_implementation: As in ``from_pretrained``.
    """

    name: str
    option: str = "model.name"
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None

    @property
    def path(self) -> str:
        """Path or name by which transformers finds it."""
        return model_path(self.name)

    def config(self) -> Any:
        """Return its configuration.

        Raises:
            UserError: It does not exist, or is not a causal language model.
        """
        with self._found():
            return decoder_config(
                self.path, self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )

    def build(self, dtype: str, weights: bool = True) -> Any:
        """Return the model in a dtype.

        Args:
            dtype: Name of a torch dtype.
            weights: Whether to load its weights; otherwise they are random.
        """
        from transformers import AutoModelForCausalLM

        config, remote = self.config(), self.trust_remote_code
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": remote}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        from_config: Any = AutoModelForCausalLM.from_config
        with self._found():
            if weights:
                return AutoModelForCausalLM.from_pretrained(self.path, revision=self.revision, **options)
            return from_config(config, **options)

    def sharded(self, dtype: str, mesh: DeviceMesh, device: torch.device, weights: bool = True) -> Any:
        """Return the model sharded over the processes of a mesh (FSDP2); see :meth:`build`."""
        model = build_sharded(lambda: self.build(dtype, False), mesh, device)
        fill(model, self.path if weights else "", self.revision, lambda: self.build(dtype, weights))
        return model

    def on_meta(self, dtype: str) -> Any:
        """Return the model on the meta device: only its configuration is read."""
        with torch.device("meta"):
            return self.build(dtype, False)

    def check_teacher(self, teacher: Pretrained, features: bool) -> None:
        """Raise UserError unless this model can learn from a teacher.

        Args:
            teacher: The teacher.
            features: Whether it learns the outputs of the teacher's blocks.
        """
        own, other = self.config(), teacher.config()
        for what in ["vocab_size", *(["num_hidden_layers", "hidden_size"] if features else [])]:
            if (mine := getattr(own, what, None)) != (its := getattr(other, what, None)):
                raise UserError(
                    f"distillation compares {'tokens' if what == 'vocab_size' else 'blocks'} one by one, and {what} is "
                    f"{mine} of {self.name!r} and {its} of teacher {teacher.name!r}: "
                    + ("give one with the same tokenizer" if what == "vocab_size" else "set feature_distillation=0")
                )

    @contextmanager
    def _found(self) -> Iterator[None]:
        """Turn errors about a model that does not exist into a UserError with advice."""
        try:
            yield
        except OSError as error:
            what = self.option.removeprefix("model.").replace("name", "model")
            raise UnavailableError(
                f"{what} {self.name!r} could not be loaded: {error}\nWithout a network give the path of a folder that "
                f"save_pretrained wrote, or --{self.option} {EMBEDDED_MODEL}, the model that comes with the package."
            ) from error
