"""Checkpoints while axolotl trains: sealed when complete, then rotated; only an equal run's is resumed."""

import shutil
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from fastdora.plugin import checkpoints, fsdp2
from fastdora.plugin.checksums import sha256, starting_files
from fastdora.plugin.errors import first_line
from fastdora.plugin.keys import RecipeError

LOG = get_logger("axolotl.fastdora")


def check(cfg) -> None:
    """Raise RecipeError where `resume_from_checkpoint` names a checkpoint that is damaged or of another run.

    Of all that a run depends on, its epochs alone may be more than the checkpoint's: it then goes on, as `_Schedule`
    says. Call it before the model is loaded. The run's own checkpoints are checked by `guard`, which sets broken ones
    aside.
    """
    if not cfg.resume_from_checkpoint:
        return
    folder = Path(cfg.resume_from_checkpoint)
    try:
        before = checkpoints.check(folder)
        if not checkpoints.has_optimizer(folder):
            raise checkpoints.BrokenCheckpoint("it has no optimizer's state")
    except checkpoints.BrokenCheckpoint as error:
        raise RecipeError(f"{cfg.axolotl_config_path}: {checkpoints.not_resumable(folder, error)}") from error
    old = before.get("recipe", {})
    keys = checkpoints.for_more_epochs(old, cfg)
    if keys is not old and cfg.lr_scheduler in checkpoints.FIXED_LENGTH:
        raise RecipeError(
            f"{cfg.axolotl_config_path}: key 'lr_scheduler': {cfg.lr_scheduler} keeps the length that {folder} began "
            f"with; set num_epochs to {old['num_epochs']}, or train anew"
        )
    check_equal(cfg, folder, before | {"recipe": keys}, "remove resume_from_checkpoint")


def check_equal(cfg, folder: Path, before: dict[str, Any], otherwise: str) -> None:
    """Raise RecipeError where the run of a checkpoint, as its seal has it, differs from this one."""
    if changed := checkpoints.difference(before, identity(cfg)):
        raise RecipeError(
            f"{cfg.axolotl_config_path}: {folder} is of a run with other settings ({changed}); change them back "
            f"or {otherwise}"
        )


def guard(cfg, trainer) -> None:
    """Check the run's own checkpoint that it would resume from, and seal each checkpoint that it writes.

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
    if folder and cfg.auto_resume_from_checkpoints and not cfg.resume_from_checkpoint:
        check_equal(cfg, folder, before, "set another output_dir")
    trainer.add_callback(_Schedule())
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
            reason = first_line(error)
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


class _Schedule(TrainerCallback):
    """Gives a resumed run the learning rates of its own schedule from its first step on, and says where they change.

    Where a run goes on to more epochs, transformers (5.16.1) rebuilds the schedule for the new number of steps, but the
    optimizer's rates are the checkpoint's until the first step is done: of a cosine that ended, zero.
    """

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate's wrapper
        if not (state.global_step and isinstance(schedule, LambdaLR)):
            return
        groups = schedule.optimizer.param_groups
        before = [float(group["lr"]) for group in groups]
        rates = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        if rates == before:
            return
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates  # what is logged
        LOG.warning(
            f"the learning rate goes from {before[0]:.3g} to {rates[0]:.3g} at step {state.global_step}, as in a run "
            f"of {state.max_steps} steps from its start"
        )


def identity(cfg) -> dict[str, Any]:
    """What must be equal to resume a run: the keys that training depends on, and the SHA-256 of each file it reads."""
    recipe = {
        key: value
        for key, value in cfg.to_dict().items()
        if value is not None and not checkpoints.MAY_CHANGE.fullmatch(key)
    }
    files = [Path(entry["path"]) for entry in [*(cfg.datasets or []), *(cfg.test_datasets or [])]]
    data = {str(path): sha256(path) for path in files if path.is_file()}
    return checkpoints.plain({"recipe": recipe, "data": data, "start": starting_files(cfg)})


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
