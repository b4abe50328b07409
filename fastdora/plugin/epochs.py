"""Each epoch's order of rows, the same on any number of processes and after a resume (accelerate 1.13.0)."""

from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler


def mend() -> None:
    """Let a new epoch reach axolotl's packing through accelerate's wrappers; calling it again changes nothing.

    The packer keeps the packs that it drew when it was first asked for its length until it is told of an epoch, and
    two wrappers do not tell it. The share of one of several processes: every epoch repeats the same packs, in another
    order than one process has. The rest of an epoch after a resume: its packs are not those of the interrupted run, so
    some rows train twice and others never. With it, all see the same packs, drawn anew each epoch from the seed.
    """
    BatchSamplerShard.set_epoch = SkipBatchSampler.set_epoch = _set_epoch


def _set_epoch(self, epoch: int) -> None:
    if hasattr(self.batch_sampler, "set_epoch"):
        self.batch_sampler.set_epoch(epoch)
