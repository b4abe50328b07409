"""Everything around the CUDA graphs: here a "replay" runs the recorded function again, so a value that was not read
from the graphs' memory would show. The graphs themselves: bench/gpu_check.py.
"""

import tempfile
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fastdora
from fastdora import attention, dora, graphs, packing
from finlora.models.load import quantisation


def rerun(run, parameters):
    """A Recording whose replays run everything again."""
    with torch.enable_grad():
        out = run()
    d_out, flat = torch.zeros_like(out), torch.zeros(sum(p.numel() for p in parameters), dtype=out.dtype)
    kept, shown = {}, out.detach().clone()

    def forward():
        with torch.enable_grad():
            kept["out"] = run()
        shown.copy_(kept["out"].detach())

    def backward():
        gradients = torch.autograd.grad(kept.pop("out"), parameters, d_out)
        flat.copy_(torch.cat([gradient.reshape(-1) for gradient in gradients]))

    replays = SimpleNamespace(replay=forward), SimpleNamespace(replay=backward)
    return graphs.Recording(*replays, shown, d_out, flat)


def made(with_dora=True, dropout=0.1, bits=16, fp8=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    if bits != 16:
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            how = quantisation(bits, torch.float32)
            base = LlamaForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)
    model = get_peft_model(
        base,
        LoraConfig(
            r=4, use_dora=with_dora, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        ),
    )
    fastdora.accelerate(model, fp8)
    attention.install(model.get_base_model())
    packing.read_label_positions(model, answers=True)
    return model.train()


def dora_layers(model):
    return [module for module in model.modules() if isinstance(module, dora.Fast)]


def batch(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 61, (1, sum(sizes)), generator=generator)
    labels = ids.clone()
    labels[:, ::3] = -100
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    segments = packing.entries(attention.Segments(*attention.boundaries(positions)))
    given = dict(input_ids=ids, position_ids=positions, labels=labels, num_items_in_batch=torch.tensor(50))
    return given | segments


BATCHES = [batch(20, 28, 12, seed=n) if n % 3 else batch(9, 9, 30, 12, seed=n) for n in range(12)]


def trained(model, batches, accumulation=2):
    """Losses and adapter after AdamW; a batch of another length and an evaluation come in between."""
    torch.manual_seed(1)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, 0.02)
    losses = []
    for number, inputs in enumerate(batches):
        loss = model(**inputs).loss
        (loss / accumulation).backward()
        losses.append(loss.item())
        if number % accumulation == accumulation - 1:
            optimizer.step()
            optimizer.zero_grad()
        if number == 7:
            model.eval()
            with torch.no_grad():
                losses.append(model(**batch(40, 20)).loss.item())
            model.train()
            model(**batch(15, seed=5)).loss.backward()
    return losses, [p.detach().clone() for p in own]


@pytest.mark.parametrize("with_dora, dropout", [(True, 0.1), (True, 0.0), (False, 0.1)])
def test_graphs_train_as_the_ordinary_way_does(monkeypatch, with_dora, dropout):
    monkeypatch.setattr(graphs, "record", rerun)
    losses, adapter = trained(made(with_dora, dropout), BATCHES)
    model = made(with_dora, dropout)
    installed = graphs.install(model)
    graph_losses, graph_adapter = trained(model, BATCHES)
    assert installed.recorded == 1 and installed.replays == len(BATCHES) - graphs.WARM_UP
    assert graph_losses == losses
    assert all(torch.equal(a, b) for a, b in zip(adapter, graph_adapter, strict=True))


def test_recorded_anew_only_where_something_that_it_holds_fast_has_changed(monkeypatch):
    monkeypatch.setattr(graphs, "record", rerun)
    model, plain = made(dropout=0.0), made(dropout=0.0)
    installed = graphs.install(model)

    def both(inputs):
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
        return installed.recorded

    recorded = [both(batch(20, 40)) for _ in range(graphs.WARM_UP + 2)]
    assert recorded == [0] * graphs.WARM_UP + [1, 1]
    assert both(batch(30, 30)) == 1
    assert both(batch(*[1] * 60)) == 2, "more samples than there was room for"
    assert both(batch(20, 40)) == 2
    for other in (model, plain):
        other.add_adapter("second", LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
        torch.manual_seed(3)
        for name, tensor in other.named_parameters():
            if "second" in name and "magnitude" not in name:
                torch.nn.init.normal_(tensor, std=0.1)
        fastdora.accelerate(other)
        other.set_adapter("second")
    assert both(batch(20, 40)) == 3
    for other in (model, plain):
        other.set_adapter("default")
    assert both(batch(20, 40)) == 4
    for other in (model, plain):
        for layer in installed.layers if other is model else dora_layers(plain):
            layer.scaling["default"] *= 2
    assert both(batch(20, 40)) == 5
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**batch(20, 40)).logits, plain(**batch(20, 40)).logits)
    assert both(batch(20, 40)) >= 5


def test_a_recording_has_no_accumulator_of_the_models_parameters(monkeypatch):
    """DDP keeps those alive, on the stream of its own making: gradients on their way there would end a recording."""
    seen = []

    def looked_at(run, parameters):
        with torch.enable_grad():
            out = run()
        nodes, met = [out.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in met:
                met.add(node)
                nodes += [following for following, _ in node.next_functions]
        seen.extend(node.variable for node in met if hasattr(node, "variable"))
        return rerun(run, parameters)

    monkeypatch.setattr(graphs, "record", looked_at)
    model = made()
    own = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.requires_grad}
    kept = [torch.autograd.graph.get_gradient_edge(parameter) for parameter in own.values()]
    graphs.install(model)
    norms = [layer.cached_norm("default").norm for layer in dora_layers(model)]
    for _ in range(graphs.WARM_UP + 1):
        model(**batch(20, 40)).loss.backward()
    assert len(seen) == len(own) == len(kept)
    assert all(leaf is not own[leaf.data_ptr()] for leaf in seen)
    assert all(parameter.grad is not None for parameter in own.values())
    assert all(layer.cached_norm("default").norm is norm for layer, norm in zip(dora_layers(model), norms, strict=True))
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == set(map(id, own.values()))


def after_bitsandbytes_own_forward(layer):
    layer.init_8bit_state()
    times_two(layer.state, "SCB")


def times_two(held, *names):
    for name in names:
        setattr(held, name, getattr(held, name) * 2)


QUANTISED = {
    "int8": (8, False, lambda layer: times_two(layer.weight, "SCB")),
    "int8 after bitsandbytes' own forward": (8, False, after_bitsandbytes_own_forward),
    "fp8": (8, True, lambda layer: times_two(layer.weight, "SCB")),
    "nf4 offset": (4, False, lambda layer: times_two(layer.weight.quant_state, "offset")),
    "nf4 blocks": (4, False, lambda layer: times_two(layer.weight.quant_state.state2, "absmax")),
}


ADAPTED = [("q_proj", kind) for kind in QUANTISED]
FROZEN = [pytest.param("o_proj", kind, marks=[pytest.mark.slow] * (kind != "fp8")) for kind in QUANTISED]


@pytest.mark.parametrize("projection, kind", [*ADAPTED, *FROZEN])
def test_scales_of_quantised_weights_are_read_where_they_lie(monkeypatch, kind, projection):
    """A graph reads them at the addresses of its recording, so scales put in their place need another one."""
    bits, fp8, change = QUANTISED[kind]
    monkeypatch.setattr(graphs, "record", rerun)
    model, plain = made(dropout=0.0, bits=bits, fp8=fp8), made(dropout=0.0, bits=bits, fp8=fp8)
    installed = graphs.install(model)
    inputs, logits = batch(20, 40), []
    for recorded in (0, 0, 1, 1, "change", 2, 2):
        if recorded == "change":
            for other in (model, plain):
                layer = getattr(other.get_base_model().model.layers[1].self_attn, projection)
                change(getattr(layer, "base_layer", layer))
            continue
        logits.append(model(**inputs).logits)
        assert torch.equal(logits[-1], plain(**inputs).logits) and installed.recorded == recorded
    assert torch.equal(logits[0], logits[3]) and not torch.equal(logits[3], logits[4])


def test_a_sample_longer_than_there_was_room_for(monkeypatch):
    monkeypatch.setattr(graphs, "record", rerun)
    model, plain = made(dropout=0.0), made(dropout=0.0)
    installed = graphs.install(model)
    for inputs in [batch(100, 200)] * 3 + [batch(300)]:
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert installed.recorded == 2 and installed.room.longest == 512


def test_two_forward_passes_before_a_backward_pass_are_refused(monkeypatch):
    monkeypatch.setattr(graphs, "record", rerun)
    model = made()
    graphs.install(model)
    for _ in range(graphs.WARM_UP):
        model(**batch(20, 40))
    first, _ = model(**batch(20, 40)).loss, model(**batch(20, 40)).loss
    with pytest.raises(RuntimeError, match="fastdora_graphs: false"):
        first.backward()


def test_other_calls_go_the_ordinary_way(monkeypatch):
    monkeypatch.setattr(graphs, "record", rerun)
    model = made()
    installed = graphs.install(model)
    inputs = batch(20, 40)
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    mask = torch.ones_like(ids)
    for kwargs in ({"attention_mask": mask}, {"position_ids": positions, "output_hidden_states": True}, {}):
        assert model(input_ids=ids, **kwargs).logits.shape == (1, 60, 61)
    assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 62)
    assert installed.passes == 0


def test_a_compiled_layer_trains_as_an_ordinary_one():
    """Dynamo alone: what it traces must not hold on to norms of the first step."""
    runs, x = [], torch.randn(5, 16)
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        torch.manual_seed(0)
        config = LoraConfig(r=2, use_dora=True, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 8)), config)
        fastdora.accelerate(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
        call, losses = wrap(model), []
        for _ in range(3):
            loss = call(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == runs[1] and runs[0][0] > runs[0][2]
