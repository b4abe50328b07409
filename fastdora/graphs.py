"""The decoder's forward and backward pass as two CUDA graphs: a step then costs the CPU two launches.

A step of one short pack has some 3,000 small launches, which take a CPU about as long as the GPU takes to run them;
with fp8 matmuls it takes longer. A graph holds the kernels for one batch shape at fixed addresses, so whatever changes
from batch to batch is read from memory: tokens, positions, sample boundaries, dropout seeds, and DoRA's norms, which
are updated before a replay where a step has made them stale. The buffers have room for more and longer samples than
the recorded batch has (an empty sample costs nothing); a batch that needs more room has the graphs recorded anew.
Batches of another shape, evaluation, gradient checkpointing and all else that is no plain training pass run without
graphs, through the same kernels.

Under DDP each process records its own graphs, when its packs need it. No collective lies in a recording: DDP reduces
the gradients that a replay hands to the parameters, in its buckets' order, so that one process may replay while another
runs without graphs or records.
"""

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn

from fastdora import attention, dora, dropout, quantized

WARM_UP = 2  # passes without graphs before the first recording: Triton compiles its kernels in them
SPARE = 1.25  # room for a quarter more samples than the recorded batch has, so that few batches record anew
# The arguments that a causal model of transformers passes to its decoder in training: those that are tensors of the
# batch, and those that do not change the decoder's result (the last two belong to the loss).
READ = {"input_ids", "position_ids"}
IGNORED = {"use_cache", "return_dict", "shift_labels", "num_items_in_batch"}


class Recording(NamedTuple):
    """Two graphs and their memory: `out` and `d_out` (B, S, H); `flat`, all parameters' gradients in one tensor."""

    forward: Any  # torch.cuda.CUDAGraph
    backward: Any
    out: torch.Tensor
    d_out: torch.Tensor
    flat: torch.Tensor


def record(run, parameters: list[torch.Tensor]) -> Recording:
    """Record `run()`, which returns the decoder's output, and the gradients of `parameters`."""
    gc.collect()
    torch.cuda.empty_cache()  # the graphs' memory pool cannot reuse what passes without graphs have cached
    pool = torch.cuda.graph_pool_handle()
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    # By default an allocation in any thread ends a capture, and the data loader's thread pins memory when it likes: of
    # 132 runs on a busy machine 2 ended so (torch 2.11, "operation failed due to a previous error during capture").
    capture = functools.partial(torch.cuda.graph, pool=pool, capture_error_mode="thread_local")
    with capture(forward):
        out = run()
    d_out = torch.zeros_like(out)
    with capture(backward):
        gradients = torch.autograd.grad(out, parameters, d_out)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    return Recording(forward, backward, out.detach(), d_out, flat)


class _Replay(torch.autograd.Function):
    """The decoder's output and its parameters' gradients, each by one graph's replay."""

    @staticmethod
    def forward(ctx, graphs, *parameters):
        ctx.graphs, ctx.recording, ctx.replays = graphs, graphs.recording, graphs.replays
        graphs.recording.forward.replay()
        return graphs.recording.out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        if ctx.replays != ctx.graphs.replays:
            raise RuntimeError("two forward passes before a backward pass: set fastdora_graphs: false")
        recording, parameters = ctx.recording, ctx.graphs.parameters
        recording.d_out.copy_(d_out)
        recording.backward.replay()
        # A copy: autograd may keep these tensors as `.grad`, and the next replay overwrites `flat`.
        parts = recording.flat.clone().split([parameter.numel() for parameter in parameters])
        return None, *(part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True))


class Graphs:
    """Replaces the `forward` of a decoder (transformers' model below the head)."""

    def __init__(self, decoder: nn.Module):
        functools.update_wrapper(self, decoder.forward)
        self.decoder, self.plain = decoder, decoder.forward
        self.layers = [module for module in decoder.modules() if isinstance(module, dora.Fast)]
        kinds = bnb.nn.Linear8bitLt | bnb.nn.Linear4bit
        self.quantized = [module for module in decoder.modules() if isinstance(module, kinds)]
        self.recording: Recording | None = None
        self.fixed: tuple = ()  # _fixed_state of the recording
        self.passes = self.replays = self.recorded = 0
        self.room: attention.Segments | None = None  # the buffers of segments, and the longest ones they serve

    def __call__(self, *args, **kwargs):
        arguments = {name for name, value in kwargs.items() if value is not None} - IGNORED
        if args or arguments != READ or not self._is_training():
            return self.plain(*args, **kwargs)
        self.passes += 1
        ids, positions = kwargs["input_ids"], kwargs["position_ids"]
        if self.passes <= WARM_UP or (self.recording is not None and ids.shape != self.ids.shape):
            return self.plain(*args, **kwargs)
        segments = attention.cached_segments(positions, ids.shape[0])
        norms, fixed = self._norms(), self._fixed_state()
        self.replays += 1
        if fixed != self.fixed or not self._has_room(segments):
            self._allocate(ids, positions, segments, norms)
            self._copy_inputs(ids, positions, segments, norms)
            self.recording, self.fixed = record(self._run, self.leaves), fixed
            self.recorded += 1
        else:
            self._copy_inputs(ids, positions, segments, norms)
        return self.output_class(last_hidden_state=_Replay.apply(self, *self.parameters))

    def _is_training(self) -> bool:
        checkpointing = getattr(self.decoder, "is_gradient_checkpointing", False)
        return torch.is_grad_enabled() and self.decoder.training and not checkpointing

    def _fixed_state(self) -> tuple:
        """What a recording has built in: the active adapters, their scaling and dropout, and all weights' addresses."""
        adapters = [(*layer.active_adapters, layer.merged, layer.disable_adapters) for layer in self.layers]
        numbers = [(layer.scaling[name], layer.dropout_probability(name)) for layer, name in self._active()]
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        scales = [tensor.data_ptr() for layer in self.quantized for tensor in quantized.quantization_tensors(layer)]
        weights = [(weight.data_ptr(), weight.requires_grad) for weight in self.decoder.parameters()]
        return *adapters, *numbers, *scales, autocast, *weights

    def _active(self) -> list[tuple[nn.Module, str]]:
        return [(layer, name) for layer in self.layers for name in layer.active_adapters if name in layer.lora_A]

    def _norms(self) -> list[torch.Tensor]:
        cached = [layer.cached_norm(name) for layer, name in self._active() if layer.use_dora[name]]
        return [tensor for each in cached for tensor in (each.norm, each.mag_scale)]

    def _has_room(self, segments: attention.Segments) -> bool:
        pairs = zip(segments, self.room or (), strict=False)
        sizes = [(len(new), len(own)) if isinstance(new, torch.Tensor) else (new, own) for new, own in pairs]
        # None: a batch without shared prefixes, whose graph has no second attention.
        return bool(sizes) and all((new is None) == (own is None) and (new or 0) <= (own or 0) for new, own in sizes)

    def _allocate(self, ids, positions, segments, norms) -> None:
        if ids.is_cuda and self.recording is not None:
            # Before its memory is freed: with expandable segments, which axolotl turns on, torch 2.11 waits only for
            # the stream that recorded, and not for the replay of the backward pass that may still be running
            # (c10/cuda/CUDACachingAllocator.cpp, unmapHandles): with several packs a step, an illegal memory access.
            torch.cuda.synchronize()
        self.recording = None  # freed first: it may hold most of the memory
        before = self.room or [None] * len(segments)
        self.room = attention.Segments(*map(_roomier, segments, before))
        self.ids, self.positions = torch.empty_like(ids), torch.empty_like(positions)
        self.norms = self.latest = norms
        self.parameters = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        self.leaves = [nn.Parameter(parameter.detach()) for parameter in self.parameters]
        drops = sum(layer.dropout_probability(name) > 0 for layer, name in self._active())
        self.seeds = dropout.Seeds(drops, ids.device)

    def _copy_inputs(self, ids, positions, segments, norms) -> None:
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        for buffer, edges in zip(self.room, segments, strict=True):
            if isinstance(edges, torch.Tensor):
                buffer[: len(edges)].copy_(edges)
                buffer[len(edges) :].copy_(edges[-1:].expand(len(buffer) - len(edges)))  # empty segments at its end
        if any(new is not old for new, old in zip(norms, self.latest, strict=True)):
            torch._foreach_copy_(self.norms, norms)
            self.latest = norms
        self.seeds.draw()

    @contextlib.contextmanager
    def _leaves_in_place(self) -> Iterator[None]:
        """Within it the modules have `leaves` for their trained parameters, over the same memory.

        DDP keeps the parameters' own accumulators of gradients, which belong to the stream that it was made on: torch
        would make that stream wait for the one that records, which ends the recording. Gradients reach the parameters,
        and DDP's hooks, through `_Replay`.
        """
        leaf_of = {id(parameter): leaf for parameter, leaf in zip(self.parameters, self.leaves, strict=True)}
        places = [
            (module._parameters, name, parameter)
            for module in self.decoder.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in leaf_of
        ]
        for parameters, name, parameter in places:
            parameters[name] = leaf_of[id(parameter)]
        try:
            yield
        finally:
            for parameters, name, parameter in places:
                parameters[name] = parameter

    def _run(self) -> torch.Tensor:
        attention.cache_segments(self.positions, self.room)
        device = self.ids.device.type
        enabled = torch.is_autocast_enabled(device)
        # Without autocast's cache of casts: those made in a recording have no values outside it.
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), enabled, cache_enabled=False)
        with self._leaves_in_place(), dora.norms_as_cached(), self.seeds, autocast:
            output = self.plain(input_ids=self.ids, position_ids=self.positions, use_cache=False)
        self.output_class = type(output)
        return output.last_hidden_state


def _roomier(new: torch.Tensor | int | None, old: torch.Tensor | int | None) -> torch.Tensor | int | None:
    """A buffer for edges, or a longest segment, with room for what comes, what was there, and slightly larger ones."""
    if new is None:
        return None
    if isinstance(new, torch.Tensor):
        size = int((len(new) - 1) * SPARE) // 32 * 32 + 32
        return new.new_empty(max(size + 1, 0 if old is None else len(old)))
    return max(old or 0, 256, 1 << max(0, new - 1).bit_length())  # a power of two: few batches need another recording


def install(model: nn.Module) -> Graphs:
    """Train the decoder of a causal PEFT model by CUDA graphs; call it after `fastdora.accelerate`."""
    decoder = model.get_base_model().get_decoder()
    decoder.forward = graphs = Graphs(decoder)
    return graphs
