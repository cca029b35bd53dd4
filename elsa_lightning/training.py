"""The commands with a Trainer, ``elsa fit | validate | test | predict | plan``, based on LightningCLI."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from elsa_lightning.callbacks.elsa import ElsaCallback
from elsa_lightning.callbacks.guide import Guide, closing
from elsa_lightning.callbacks.keep_mask import KeepMask
from elsa_lightning.callbacks.progress import LineProgress, WordProgress
from elsa_lightning.callbacks.strategies import SHARDING
from elsa_lightning.callbacks.versions import SaveConfigOnce, claim_versions, unused
from elsa_lightning.errors import UserError, for_users
from elsa_lightning.export.folders import write
from elsa_lightning.lm.data import CalibrationData
from elsa_lightning.lm.module import CausalLM
from elsa_lightning.lm.supported import check_tokens
from elsa_lightning.options import OneLineParser
from elsa_lightning.plan import Plan, plan

_TOKENIZERS = ("--data.tokenizer", "--data.init_args.tokenizer")
_KNOWN_CHECKPOINTS = ("last", "best", "hpc", "registry")  # Lightning resolves these itself


class ElsaTrainer(Trainer):
    """A Trainer that can also plan the memory of a run."""

    @property
    def elsa(self) -> ElsaCallback | None:
        """The run's ElsaCallback."""
        return next((c for c in self.callbacks if isinstance(c, ElsaCallback)), None)  # type: ignore[attr-defined]

    def plan(
        self, model: CausalLM, datamodule: LightningDataModule, devices: int = 1, gpu_memory: float | None = None
    ) -> None:
        """Print the memory that fit would take, without loading anything.

        Args:
            model: The model to prune; only its configuration is read.
            datamodule: The batches; only for CalibrationData is their size known, and with it the activations' memory.
            devices: Number of GPUs over which FSDP would shard.
            gpu_memory: GiB of each GPU, to tell whether the run fits.
        """
        if devices < 1:
            raise UserError(f"devices must be 1 or more, got {devices}")
        if gpu_memory is not None and gpu_memory <= 0:
            raise UserError(f"gpu_memory must be above 0 GiB, got {gpu_memory:g}")
        size = "of unknown size, whose activations are not counted,"
        if isinstance(datamodule, CalibrationData):
            size = f"of {datamodule.batch_size} × {datamodule.seq_len} tokens"
        print(f"{model.name}, batches {size} on each device")
        planned = self.memory(model, datamodule)
        if planned.warning:
            print(planned.warning)
        print(planned.table(devices, gpu_memory))

    def memory(self, model: CausalLM, datamodule: LightningDataModule, device: str = "cuda") -> Plan:
        """Return the memory plan of this Trainer's run on a kind of device."""
        precision = str(self.precision)
        elsa = None if isinstance(self.elsa, KeepMask) else self.elsa  # KeepMask stores only one bit a weight
        meta = model.on_meta()
        tokens = 0
        if isinstance(datamodule, CalibrationData):
            model.check_length(meta.config, datamodule.seq_len)
            check_tokens(meta.config, datamodule, model.name)
            tokens = datamodule.batch_size * datamodule.seq_len
        half = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
        return plan(
            nn.ModuleDict({"model": meta}),  # same names as in the module
            model.optimizer,
            dtype=half.get(precision, getattr(torch, model.dtype_name)),
            autocast=precision.endswith("-mixed"),
            targets=elsa.targets if elsa else (),
            ignore=elsa.ignore if elsa else (),
            constraint=elsa.constraint if elsa else None,
            state_dtype=elsa.state_dtype if elsa else None,
            teacher=model.teacher_source.on_meta(model.dtype_name) if model.teacher is not None else model.distils,
            tokens=tokens,
            checkpointing=model.gradient_checkpointing,
            device=device,
        )


class ElsaCLI(LightningCLI):
    """LightningCLI for a :class:`CausalLM`; the callback has options of its own, ``--elsa.*``.

    If no data module class is fixed, any may be given, and :class:`CalibrationData` is the default. The tokenizer is
    the model's.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer's methods, with the arguments that do not become options."""
        return {**LightningCLI.subcommands(), "plan": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback's arguments, and link the data's tokenizer to the model's name."""
        parser.add_class_arguments(ElsaCallback, "elsa", instantiate=False, sub_configs=True)
        if self.subclass_mode_data:
            parser.set_defaults({"data": {"class_path": "elsa_lightning.CalibrationData"}})
        parser.link_arguments("model.name", "data.init_args.tokenizer" if self.subclass_mode_data else "data.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse a tokenizer, because the link to the model's would silently replace it."""
        given = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        if any(str(argument).partition("=")[0].startswith(_TOKENIZERS) for argument in given):
            raise UserError(
                "data.tokenizer is the model's own here: save it into the model's folder, and give that to --model.name"
            )
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Ignore a checkpoint's arguments in fit: the command line defines the model of a resumed run."""
        if self.config.get("subcommand") != "fit":
            super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Refuse a run without a length, which Lightning would end after 1000 epochs."""
        trainer = self._get(self.config, "trainer")
        ends = trainer.max_steps != -1 or trainer.max_epochs is not None or trainer.max_time is not None
        if self.subcommand == "fit" and not ends and not trainer.fast_dev_run:
            raise UserError(
                "nothing says how long to train: give --config configs/elsa.yaml, which prunes the embedded model to "
                "90 % in 1000 steps, or --elsa.sparsity 0.9 and --trainer.max_steps 1000"
            )

    def instantiate_classes(self) -> None:
        """Turn errors of the Trainer, or of a package that a logger needs, into one line."""
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            if for_users(error) is not None:
                raise
            first: BaseException = error  # jsonargparse wraps it in errors about other types of the option
            while first.__cause__ is not None:
                first = first.__cause__
            raise UserError(f"{first} (JSONARGPARSE_DEBUG=1 in the environment shows where)") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if self.subcommand == "plan":  # planning for other machines must work on this one
            config |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
        listed = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        elsa, defaults = self._get(self.config_init, "elsa"), self._parser(self.subcommand).get_defaults()
        if given := [name for name, value in elsa.items() if value != defaults.elsa[name]]:
            if any(isinstance(callback, ElsaCallback) for callback in listed):
                raise UserError(
                    f"elsa.{given[0]} asks for an ElsaCallback beside the one under trainer.callbacks: set that one's "
                    f"arguments with --trainer.callbacks.{given[0]}, or move them to 'elsa:' in the configuration"
                )
            optimizer = self._get(self.config, "model").optimizer
            if elsa["learning_rate"] is None and _rate(optimizer) == _rate(defaults.model.optimizer):  # given none
                elsa["learning_rate"] = "auto"
            callbacks = [*callbacks, ElsaCallback(**elsa)]
        barred = config["enable_progress_bar"] is False or any(isinstance(c, ProgressBar) for c in listed)
        if not barred:
            callbacks = [*callbacks, WordProgress() if sys.stdout.isatty() else LineProgress()]
        if config["enable_model_summary"] is None and not any(isinstance(c, ModelSummary) for c in listed):
            config = config | {"enable_model_summary": False}  # it would have two rows
        trainer = super()._instantiate_trainer(config, callbacks)
        claim_versions(trainer)
        return trainer

    def after_predict(self) -> None:
        """Write the predictions, one line for each sequence."""
        batches: Any = self.trainer.predict_loop.predictions
        if self.trainer.world_size > 1:
            rank_zero_warn("each process predicted its own share, and nothing is written; set --trainer.devices 1")
        if not batches or self.trainer.world_size > 1:
            return
        file = unused(Path(self.trainer.log_dir or self.trainer.default_root_dir) / "predictions.jsonl")
        losses = torch.cat(batches).tolist()
        lines = [json.dumps({"sequence": place, "nats_a_token": loss}) + "\n" for place, loss in enumerate(losses)]
        write(file, "".join(lines))
        print(f"{len(losses)} sequences, mean {sum(losses) / len(losses):.4f} nats a token: {file}")

    def after_fit(self) -> None:
        """Print the result of the run, and suggestions for the folder that it wrote."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        logs = self.trainer.log_dir  # on every process: reading it is a broadcast
        name = next((c.config_filename for c in callbacks if isinstance(c, SaveConfigOnce)), None)
        if name is None or logs is None or not self.trainer.is_global_zero:
            return
        again = f"--config {Path(logs) / name}" + (" --ckpt_path null" if self.config.fit.ckpt_path else "")
        given = self.config.fit.elsa
        sparsity = "--trainer.callbacks.sparsity" if given.sparsity is None else "--elsa.sparsity"
        if told := closing(self.trainer, logs, again, None if given.constraint else sparsity):
            print(f"\n{told}")

    def before_validate(self) -> None:
        """Check the checkpoint before anything is loaded."""
        check_checkpoint(self.config[self.subcommand].ckpt_path, self.trainer)

    before_test = before_predict = before_validate

    def before_fit(self) -> None:
        """Plan the memory of the run; a model or optimizer for which that fails runs all the same."""
        assert isinstance(self.trainer, ElsaTrainer)
        check_checkpoint(self.config.fit.ckpt_path, self.trainer)
        if self.model.pretrained and self.trainer.elsa is None:
            rank_zero_warn("nothing is pruned: give --elsa.sparsity 0.9, or --config configs/elsa.yaml, which has it")
        guide = Guide(self.model.name)
        self.trainer.callbacks.append(guide)  # type: ignore[attr-defined]
        try:
            planned = self.trainer.memory(self.model, self.datamodule, self.trainer.strategy.root_device.type)
        except Exception as error:
            if for_users(error) is not None:
                raise
            rank_zero_warn(f"the run's memory could not be planned: {type(error).__name__}: {error}")
        else:
            guide.sizes = (planned.constrained, planned.parameters)
            shards = self.trainer.world_size if isinstance(self.trainer.strategy, SHARDING) else 1
            guide.memory = planned.total(shards) / 2**30


def _rate(optimizer: Any) -> tuple[Any, Any]:
    """Return the class and the learning rate of an optimizer in a configuration."""
    arguments = getattr(optimizer, "init_args", None)
    return getattr(optimizer, "class_path", optimizer), None if arguments is None else arguments.get("lr")


def check_checkpoint(given: str | None, trainer: Trainer) -> None:
    """Raise UserError if ``ckpt_path`` is not a checkpoint that this Trainer can load."""
    if not given or given in _KNOWN_CHECKPOINTS or ":" in given:  # registry:...
        return
    path = Path(given).expanduser()
    if not path.exists():
        raise UserError(f"ckpt_path {given!r} does not exist; give a .ckpt of an earlier run")
    if path.is_dir() and not (path / ".metadata").is_file():  # every distributed checkpoint has it
        raise UserError(
            f"ckpt_path {given!r} is a folder, and no checkpoint: give a .ckpt in the folder checkpoints of a run; "
            f"a Hugging Face folder goes to model.name"
        )
    if path.is_dir() and not isinstance(trainer.strategy, SHARDING):
        raise UserError(
            f"ckpt_path {given!r} is a distributed checkpoint, which {type(trainer.strategy).__name__} does not load: "
            f"give the run's own trainer.strategy, also on one device (data_parallel_size: 1), or make a model's "
            f"folder of it with elsa export --from {given!r} --to hf"
        )
    if path.suffix in (".yaml", ".yml", ".json", ".safetensors", ".bin"):
        raise UserError(f"ckpt_path {given!r} is no checkpoint: give a .ckpt of an earlier run")


def run(arguments: Sequence[str], from_shell: bool) -> None:
    """Run a command that has a Trainer.

    Args:
        arguments: The arguments after the program's name.
        from_shell: Whether they come from ``sys.argv``; LightningCLI then reads it itself, and would warn about both.
    """
    given = [argument.partition("=")[0] for argument in arguments]
    asks_for_help = {"-h", "--help"} & {*given} and "--data" not in given
    try:
        ElsaCLI(
            CausalLM,
            CalibrationData if asks_for_help else None,  # help lists the options of a fixed class only
            trainer_class=ElsaTrainer,
            seed_everything_default=0,
            parser_kwargs={
                "prog": "elsa",
                "description": "Prune Hugging Face language models with Elsa.",
                "allow_abbrev": False,
            },
            parser_class=OneLineParser,
            save_config_callback=SaveConfigOnce,
            save_config_kwargs={"overwrite": True},  # the empty file that reserved the name
            auto_configure_optimizers=False,  # CausalLM has its own optimizer and schedule
            args=None if from_shell else list(arguments),
        )
        _end_processes()
    except SystemExit:  # raised by SaveOnTerminate, on every process
        _end_processes()
        raise


def _end_processes() -> None:
    """Destroy the process group: its threads could abort the process at interpreter exit, which counts as a failure."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
