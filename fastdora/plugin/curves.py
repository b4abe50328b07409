"""TensorBoard's event files beside the adapter; a failure to write them loses the curves, not the run."""

from axolotl.utils.logging import get_logger
from transformers.integrations import TensorBoardCallback

LOG = get_logger("axolotl.fastdora")


def guard(trainer) -> None:
    """Replace transformers' TensorBoard callback, where the recipe enables it, by one that survives a full disk.

    TensorBoard's writer raises its OSError at the next event, which would end the training loop.
    """
    if any(isinstance(callback, TensorBoardCallback) for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(TensorBoardCallback)
        trainer.add_callback(_Curves())


class _Curves(TensorBoardCallback):
    lost = False

    def on_train_begin(self, *args, **kwargs):
        self.attempt(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args, **kwargs):
        self.attempt(super().on_log, *args, **kwargs)

    def on_train_end(self, *args, **kwargs):
        self.attempt(super().on_train_end, *args, **kwargs)

    def attempt(self, hook, *args, **kwargs) -> None:
        if self.lost:
            return
        try:
            hook(*args, **kwargs)
        except OSError as error:
            self.lost = True
            LOG.warning(
                f"{self.logging_dir} could not be written ({error}); training continues without TensorBoard's curves"
            )
