"""Each epoch's order of rows, the same on any number of processes and after a resume (accelerate 1.13.0)."""

from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler


def patch() -> None:
    """Pass each new epoch to axolotl's packing through accelerate's wrappers; calling it again changes nothing.

    The packer draws its packs when its length is first read and keeps them until `set_epoch`, which two wrappers do not
    forward. BatchSamplerShard, one process's share: every epoch repeats the same packs, in another order than in a run
    of one process. SkipBatchSampler, the rest of an epoch after a resume: its packs are not those of the interrupted
    run, so some rows train twice and others never. Patched, all draw the same packs anew each epoch from the seed.
    """
    BatchSamplerShard.set_epoch = SkipBatchSampler.set_epoch = _set_epoch


def _set_epoch(self, epoch: int) -> None:
    if hasattr(self.batch_sampler, "set_epoch"):
        self.batch_sampler.set_epoch(epoch)
