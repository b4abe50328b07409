"""Each epoch's order of rows, the same on any number of processes (accelerate 1.13.0)."""

from accelerate.data_loader import BatchSamplerShard


def mend() -> None:
    """Let a new epoch reach axolotl's packing on several processes; calling it again changes nothing.

    accelerate hands each process a share of the packer's batches but does not tell the packer of a new epoch: it keeps
    the packs that it drew when it was first asked for its length, so that every epoch repeats them in the same order,
    and one process trains in another order than two. With it, both see the same packs in the same order, drawn anew
    each epoch from the seed.
    """
    BatchSamplerShard.set_epoch = _set_epoch


def _set_epoch(self, epoch: int) -> None:
    if hasattr(self.batch_sampler, "set_epoch"):
        self.batch_sampler.set_epoch(epoch)
