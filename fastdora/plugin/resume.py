"""Checkpoints while axolotl trains: sealed when complete, then rotated; only an equal run's is resumed."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from fastdora.plugin import checkpoints, fsdp2
from fastdora.plugin.keys import RecipeError

LOG = get_logger("axolotl.fastdora")
# Keys that may change between a run and its resumption: paths and devices, logging, how often it saves.
MAY_CHANGE = re.compile(
    r"axolotl_config_path|output_dir|dataset_prepared_path|dataset_num_proc|dataset_processes|capabilities|"
    r"env_capabilities|device|device_map|local_rank|resume_from_checkpoint|auto_resume_from_checkpoints|logging_steps|"
    r"saves?_.*|dataloader_.*|use_(tensorboard|wandb|mlflow|comet|trackio)|wandb_.*|(hf_)?mlflow_.*|comet_.*|trackio_.*|"
    r".*(token|api_key|password|secret)"
)


def guard(cfg, trainer) -> None:
    """Check the checkpoint that the run would resume from, and seal each checkpoint that it writes.

    Raises RecipeError where the last complete checkpoint belongs to a run of other keys or data. A single process
    skips a checkpoint that cannot be written (a full disk). Distributed processes cannot continue without each other:
    there the run ends, and the same command resumes from the last complete checkpoint.
    """
    out, run = Path(cfg.output_dir), identity(cfg)
    if trainer.args.should_save:
        for line in checkpoints.last_whole(out)[2]:
            LOG.warning(line)
    wait()
    folder, before, _ = checkpoints.last_whole(out)
    if folder and (cfg.auto_resume_from_checkpoints or cfg.resume_from_checkpoint):
        if changed := checkpoints.difference(before, run):
            raise RecipeError(
                f"{cfg.axolotl_config_path}: {folder} is of a run with other settings ({changed}); change them back "
                "or set another output_dir"
            )
    save = trainer._save_checkpoint

    def sealed(*args, **kwargs) -> None:
        folder = out / f"{checkpoints.PREFIX}{trainer.state.global_step}"
        if not finite(trainer.model, trainer.args.device):
            LOG.warning(f"{folder} is not written: the adapter holds values that are not finite")
            return
        (folder / checkpoints.SEAL).unlink(missing_ok=True)
        limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None  # rotate only after the seal
        try:
            save(*args, **kwargs)
            fsdp2.save_adapter(trainer, folder)
            wait()
            if trainer.args.should_save:
                checkpoints.seal(folder, run)
        except (OSError, SafetensorError, RuntimeError) as error:
            if is_distributed() or isinstance(error, torch.OutOfMemoryError):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            last = checkpoints.last_whole(out)[0]
            reason = str(error).splitlines()[0]
            LOG.error(
                f"{folder} could not be written ({reason}); training continues, the last whole checkpoint is {last}"
            )
            return
        finally:
            trainer.args.save_total_limit = limit
        if trainer.args.should_save:
            rotate_checkpoints(
                output_dir=str(out),
                save_total_limit=limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
                use_mtime=False,
            )

    trainer._save_checkpoint = sealed


def identity(cfg) -> dict[str, Any]:
    """What must be equal to resume a run: the keys that training depends on, and the SHA-256 of each data file."""
    recipe = {key: value for key, value in cfg.to_dict().items() if value is not None and not MAY_CHANGE.fullmatch(key)}
    files = [Path(entry["path"]) for entry in [*(cfg.datasets or []), *(cfg.test_datasets or [])]]
    data = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    return checkpoints.plain({"recipe": recipe, "data": data})


def finite(model, device: torch.device) -> bool:
    """Whether all trainable parameters are finite on every process; of a sharded one, each process checks its part."""
    parts = [_local_part(parameter) for parameter in model.parameters() if parameter.requires_grad]
    good = torch.stack([torch.isfinite(part).all() for part in parts]).all()
    if is_distributed():
        number = good.to(device, torch.uint8)  # offloaded parameters are on the CPU
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MIN)
        good = number
    return bool(good)


def _local_part(parameter: torch.Tensor) -> torch.Tensor:
    part = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3's
    return part.to_local() if hasattr(part, "to_local") else part  # FSDP2's


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def wait() -> None:
    if is_distributed():
        torch.distributed.barrier()
