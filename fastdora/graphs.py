"""The decoder's forward and backward pass as two CUDA graphs: a step then costs the CPU two launches.

A step of one short pack is some 3,000 small launches, which take a CPU about as long as they take the GPU; with fp8
products they take it longer. A graph holds the kernels for one shape of batch at fixed addresses, so what changes from
batch to batch is read from memory: tokens, positions, the samples' boundaries, dropout's seeds, and DoRA's norms, which
are taken before a replay where a step has made them stale. Boundaries and the longest sample have room to spare (an
empty sample costs nothing); a batch that needs more has the graphs recorded anew. A batch of another shape, evaluation,
recomputation, and whatever else is not a plain training pass goes the ordinary way, through the same kernels.
"""

import functools
import gc
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn

from fastdora import attention, dora, kernels, quantized

WARM_UP = 2  # ordinary passes before the first recording, in which kernels are compiled
SPARE = 1.25  # room for more samples than the batch has that is recorded
# What a causal model hands to its decoder in training. The last ones are for the loss, and change nothing in it.
READ = {"input_ids", "position_ids"}
IGNORED = {"use_cache", "return_dict", "shift_labels", "num_items_in_batch"}


class Recording(NamedTuple):
    """Two graphs and what they read and write: `out` and `d_out` (B, S, H); `flat`, all parameters' gradients."""

    forward: Any  # torch.cuda.CUDAGraph
    backward: Any
    out: torch.Tensor
    d_out: torch.Tensor
    flat: torch.Tensor


def record(run, parameters: list[torch.Tensor]) -> Recording:
    """Record `run()`, which returns the decoder's output, and the gradients of `parameters`."""
    gc.collect()
    torch.cuda.empty_cache()  # of the activations of ordinary passes
    pool = torch.cuda.graph_pool_handle()
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward, pool=pool):
        out = run()
    d_out = torch.zeros_like(out)
    with torch.cuda.graph(backward, pool=pool):
        found = torch.autograd.grad(out, parameters, d_out)
        flat = torch.cat([gradient.reshape(-1) for gradient in found])
    return Recording(forward, backward, out.detach(), d_out, flat)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs, *parameters):
        ctx.graphs, ctx.recording, ctx.turn = graphs, graphs.recording, graphs.turn
        graphs.recording.forward.replay()
        return graphs.recording.out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        if ctx.turn != ctx.graphs.turn:
            raise RuntimeError("two forward passes before a backward pass: set fastdora_graphs: false")
        recording, parameters = ctx.recording, ctx.graphs.parameters
        recording.d_out.copy_(d_out)
        recording.backward.replay()
        # A copy: autograd may keep what it is given as `.grad`, and the next replay would write over that.
        parts = recording.flat.clone().split([parameter.numel() for parameter in parameters])
        return None, *(part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True))


class Graphs:
    """The `forward` of a decoder (transformers' model below the head), in place of its own."""

    def __init__(self, decoder: nn.Module):
        functools.update_wrapper(self, decoder.forward)
        self.decoder, self.plain = decoder, decoder.forward
        self.layers = [module for module in decoder.modules() if isinstance(module, dora.Fast)]
        kinds = bnb.nn.Linear8bitLt | bnb.nn.Linear4bit
        self.quantised = [module for module in decoder.modules() if isinstance(module, kinds)]
        self.recording: Recording | None = None
        self.identity: tuple = ()
        self.passes = self.turn = self.recorded = 0
        self.samples = self.longest = 0  # room for them in a batch

    def __call__(self, *args, **kwargs):
        given = {name for name, value in kwargs.items() if value is not None} - IGNORED
        if args or given != READ or not self._is_training():
            return self.plain(*args, **kwargs)
        self.passes += 1
        ids, positions = kwargs["input_ids"], kwargs["position_ids"]
        if self.passes <= WARM_UP or (self.recording is not None and ids.shape != self.ids.shape):
            return self.plain(*args, **kwargs)
        edges, longest = attention.recall(positions, ids.shape[0])
        norms, identity = self._norms(), self._identity()
        self.turn += 1
        if identity != self.identity or len(edges) - 1 > self.samples or longest > self.longest:
            self._make_room(ids, positions, edges, longest, norms)
            self._fill(ids, positions, edges, norms)
            self.recording, self.identity = record(self._run, self.parameters), identity
            self.recorded += 1
        else:
            self._fill(ids, positions, edges, norms)
        return self.kind(last_hidden_state=_Replay.apply(self, *self.parameters))

    def _is_training(self) -> bool:
        recomputes = getattr(self.decoder, "is_gradient_checkpointing", False)
        return torch.is_grad_enabled() and self.decoder.training and not recomputes

    def _identity(self) -> tuple:
        """What a recording holds fast: the adapters at work, their numbers, and where all weights lie."""
        found = [(*layer.active_adapters, layer.merged, layer.disable_adapters) for layer in self.layers]
        found += [(layer.scaling[name], layer.dropout_of(name)) for layer, name in self._active()]
        kinds = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        found += [tensor.data_ptr() for layer in self.quantised for tensor in quantized.beside_weight(layer)]
        return *found, kinds, *((p.data_ptr(), p.requires_grad) for p in self.decoder.parameters())

    def _active(self) -> list[tuple[nn.Module, str]]:
        return [(layer, name) for layer in self.layers for name in layer.active_adapters if name in layer.lora_A]

    def _norms(self) -> list[torch.Tensor]:
        known = [layer.known(name) for layer, name in self._active() if layer.use_dora[name]]
        return [tensor for found in known for tensor in (found.norm, found.gain)]

    def _make_room(self, ids, positions, edges, longest, norms) -> None:
        self.recording = None  # first, since it may hold most of the memory
        self.samples = max(self.samples, int((len(edges) - 1) * SPARE) // 32 * 32 + 32)
        self.longest = max(self.longest, 256, 1 << (longest - 1).bit_length())
        self.ids, self.positions = torch.empty_like(ids), torch.empty_like(positions)
        self.edges = edges.new_empty(self.samples + 1)
        self.norms = self.latest = norms
        self.parameters = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        drops = sum(layer.dropout_of(name) > 0 for layer, name in self._active())
        self.seeds = kernels.Seeds(drops, ids.device)

    def _fill(self, ids, positions, edges, norms) -> None:
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.edges[: len(edges)].copy_(edges)
        self.edges[len(edges) :].fill_(ids.numel())
        if any(new is not old for new, old in zip(norms, self.latest, strict=True)):
            torch._foreach_copy_(self.norms, norms)
            self.latest = norms
        self.seeds.draw()

    def _run(self) -> torch.Tensor:
        attention.remember(self.positions, self.edges, self.longest)
        kind = self.ids.device.type
        on = torch.is_autocast_enabled(kind)
        # Without its cache: casts made in a recording are no use outside it.
        with self.seeds, torch.autocast(kind, torch.get_autocast_dtype(kind), on, cache_enabled=False):
            found = self.plain(input_ids=self.ids, position_ids=self.positions, use_cache=False)
        self.kind = type(found)
        return found.last_hidden_state


def install(model: nn.Module) -> Graphs:
    """Let the decoder of a causal PEFT model, after `fastdora.accelerate`, train by CUDA graphs."""
    decoder = model.get_base_model().get_decoder()
    decoder.forward = graphs = Graphs(decoder)
    return graphs
