"""An axolotl plugin for tests: the progress, and the optimizer of the checkpoint at step 4, meet a full disk."""

from pathlib import Path

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback


class _Fill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # the file of the progress, before it is first written
            stepping = Path(args.output_dir) / "stepping"
            stepping.unlink(missing_ok=True)
            stepping.symlink_to("/dev/full")
        folder = Path(args.output_dir) / "checkpoint-4"
        if state.global_step == 3 and not folder.exists():
            folder.mkdir()
            (folder / "optimizer.pt").symlink_to("/dev/full")


class FullDisk(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        return [_Fill()]
