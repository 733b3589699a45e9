"""The fused backend. On a CPU its step runs without a graph, and its kernels run under Triton's interpreter."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import cifar_fast.backends.fused
from cifar_fast import CNN, Recipe, draw_epoch, fit
from cifar_fast.backends.base import autocast
from cifar_fast.backends.eager import Compiled, Eager
from cifar_fast.backends.fused import (
    PADDED_CHANNELS,
    Fused,
    GlobalMaxPool2d,
    fastest_deterministic_convolutions,
    fuse,
)
from cifar_fast.data.tensors import device_data
from cifar_fast.kernels.record_step import record_reference
from cifar_fast.model import build_model
from cifar_fast.train import main
from tests.helpers import DEVICE, NARROW, save_npz, small_dataset

GPU_RECIPE = Recipe(epochs=2, batch_size=4, widths=(4, 8, 8, 16))
"""The recipe of test_replay.py, so that both share the kernels that were compiled."""
RECIPE = Recipe(epochs=2, batch_size=4, widths=NARROW)


def make(dataset, recipe=RECIPE, dtype=torch.float32, seed=0):
    """Return a fused backend at the start of a run, and the plain model whose weights it has."""
    torch.manual_seed(seed)
    model = CNN(recipe, dataset.num_classes)
    backend = Fused(recipe, device_data(dataset, DEVICE), DEVICE, dtype, torch.channels_last)
    backend.reset(model)
    return backend, model


def momenta(backend):
    return [backend.optimizer.state[parameter]["momentum_buffer"] for parameter in backend.model.parameters()]


def train(backend, draws):
    """Return copies of the losses of an epoch and of which predictions are correct."""
    losses, correct = zip(*((loss.clone(), correct.clone()) for loss, correct in backend.train_epoch(draws)))
    return torch.stack(losses), torch.stack(correct)


def test_fused_model_saves_and_loads_the_plain_state_dict():
    plain = CNN(RECIPE, 3)
    fused = fuse(copy.deepcopy(plain))
    theirs, ours = plain.state_dict(), fused.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = CNN(RECIPE, 3)
    fused.load_state_dict(other.state_dict())
    plain.load_state_dict(fused.state_dict())
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    assert tuple(ours["seq.0.weight"].shape) == (4, 3, 3, 3), "the padding is not saved"


def test_fuse_replaces_every_norm_activation_and_pool():
    layers = [type(layer).__name__ for layer in fuse(CNN(Recipe(), 10)).seq]
    assert layers.count("BatchNormAct2d") == 8 and layers.count("PaddedConv2d") == 1 and layers.count("Conv2d") == 7
    assert not {"BatchNorm2d", "CELU", "MaxPool2d"} & set(layers) and layers.count("GlobalMaxPool2d") == 1
    assert [layer.pool for layer in fuse(CNN(Recipe(), 10)).seq if hasattr(layer, "pool")] == [1, 2, 1, 1, 2, 2, 1, 1]


@pytest.mark.parametrize("change", [lambda model: model, fuse], ids=["plain", "fused"])
def test_logits_are_float32_also_in_bfloat16(few_programs, change):
    """In bfloat16, two largest logits of an image are often equal."""
    model = build_model(RECIPE, 3, DEVICE, torch.bfloat16, change=change).to(memory_format=torch.channels_last)
    assert list(model.state_dict()) == list(CNN(RECIPE, 3).state_dict())
    channels = model.seq[0].weight.shape[1]
    images = torch.randn(2, channels, 32, 32).to(DEVICE, torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with autocast(DEVICE, torch.bfloat16):
        logits = model(images)
        assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16())
    logits.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_padded_channels_change_the_first_convolution_only_by_rounding():
    torch.manual_seed(0)
    plain = CNN(Recipe(), 10)
    padded = fuse(copy.deepcopy(plain)).seq[0]
    x = torch.randn(2, 3, 32, 32)
    expected = plain.seq[0](x)
    y = padded(F.pad(x, (0, 0, 0, 0, 0, PADDED_CHANNELS - 3)))
    assert (y - expected).norm() <= 1e-6 * expected.norm()
    y.square().sum().backward()
    expected.square().sum().backward()
    gradient, expected = padded.weight.grad, plain.seq[0].weight.grad
    assert gradient.shape == (64, PADDED_CHANNELS, 3, 3) and not gradient[:, 3:].any()
    assert (gradient[:, :3] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("values", ["random", "ties", "NaN", "infinite"])
def test_global_max_pool_equals_torch_with_its_gradient(values):
    x = torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    x = {
        "random": x,
        "ties": x.round(),
        "NaN": torch.where(x > 1.5, torch.nan, x),
        "infinite": torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x)),
    }[values].contiguous(memory_format=torch.channels_last)
    outcomes = []
    for pool in (GlobalMaxPool2d(), torch.nn.MaxPool2d(4)):
        taken = x.clone().requires_grad_()
        y = pool(taken)
        y.backward(torch.arange(18.0).view_as(y))
        outcomes.append((y, taken.grad))
    (ours, our_gradient), (theirs, gradient) = outcomes
    assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
    assert values == "NaN" or torch.equal(our_gradient, gradient)  # torch sends the gradient to the last of several NaN


@pytest.mark.slow  # the interpreter
def test_construction_changes_no_weight_momentum_or_generator(uncompiled, few_programs):
    dataset = small_dataset(train=10, test=6)
    torch.manual_seed(0)
    model = CNN(RECIPE, dataset.num_classes)
    state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state() if DEVICE.type == "cuda" else None
    backend = Fused(RECIPE, device_data(dataset, DEVICE), DEVICE, torch.float32, torch.channels_last)
    backend.reset(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert DEVICE.type == "cpu" or torch.equal(torch.cuda.get_rng_state(), device_state)
    plain = CNN(RECIPE, dataset.num_classes)
    plain.load_state_dict(backend.state_dict())
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert all(not momentum.any() for momentum in momenta(backend)) and backend.state.global_step.item() == 0


@pytest.mark.slow  # the interpreter
def test_construction_runs_a_step_that_reset_undoes(uncompiled, few_programs, monkeypatch):
    """Without this step the previous test would prove nothing."""
    monkeypatch.setattr(Fused, "reset", lambda self, model: None)
    backend, model = make(small_dataset(train=10, test=6))
    assert backend.state.global_step.item() > 0 and any(momentum.any() for momentum in momenta(backend))
    assert not torch.equal(backend.state_dict()["seq.0.weight"].cpu(), model.state_dict()["seq.0.weight"])


@pytest.mark.slow  # the interpreter
def test_second_run_equals_the_first(uncompiled, few_programs):
    dataset = small_dataset(train=10, test=6)
    draws = [draw_epoch(10, device=DEVICE) for _ in range(2)]
    backend, model = make(dataset)
    first = [train(backend, drawn)[0] for drawn in draws]
    scores = backend.evaluate()[1].clone()
    weights = {name: tensor.clone() for name, tensor in backend.state_dict().items()}
    assert not torch.equal(first[0], first[1])
    backend.reset(model)
    again = [train(backend, drawn)[0] for drawn in draws]
    assert torch.equal(torch.stack(first), torch.stack(again)) and torch.equal(backend.evaluate()[1], scores)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backend.state_dict().items())


@pytest.mark.slow  # the interpreter
def test_epoch_and_evaluation_agree_with_eager(uncompiled, few_programs):
    """The epoch drops two images, and the last evaluated batch is short."""
    dataset = small_dataset(train=13, test=6).for_recipe(RECIPE, validation=3)
    draws = draw_epoch(10, device=DEVICE)
    fused, model = make(dataset)
    eager = Eager(RECIPE, device_data(dataset, DEVICE), DEVICE, torch.float32, torch.contiguous_format)
    eager.reset(model)
    ours, theirs = train(fused, draws), train(eager, draws)
    assert ours[0].shape == (2, 4)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-4) and torch.equal(ours[1], theirs[1])
    assert fused.model.seq[0].weight[:, :3].all() and not fused.model.seq[0].weight[:, 3:].any(), "zeros stay zeros"
    (losses, correct), (expected, same) = fused.evaluate(), eager.evaluate()
    assert torch.allclose(losses, expected, rtol=1e-3) and torch.equal(correct, same) and len(correct) == 9
    assert fused.state.global_step.item() == 2


@pytest.mark.nightly  # the interpreter
def test_abandoned_epoch_does_not_shift_the_next_one(uncompiled, few_programs):
    backend, _ = make(small_dataset(train=10, test=6))
    draws = draw_epoch(10, device=DEVICE)
    next(backend.train_epoch(draws))
    training = backend.train_epoch(draws)
    assert next(training) is not None
    assert (backend.state.global_step.item(), backend.state.epoch_step.item()) == (3, 1)
    assert backend.state.lr.item() == pytest.approx(RECIPE.learning_rate(4, 2))
    next(training)
    assert (backend.state.global_step.item(), backend.state.epoch_step.item()) == (4, 0)


@pytest.mark.slow  # 2,328 steps
def test_optimizer_sees_the_scheduled_learning_rate_at_all_2328_steps(uncompiled, few_programs, monkeypatch):
    """The test uses the real counters, schedule and optimizer of 24 epochs of 97 steps, with a model of one weight."""
    recipe = Recipe(batch_size=1, widths=(1,))
    backend, _ = make(small_dataset(train=97, test=2), recipe)
    weight = next(backend.model.parameters())
    gradient = torch.ones(1, device=DEVICE)
    backend.loss_grad_fn = lambda images, labels: (
        images.mean((1, 2, 3)) * weight.mean(),
        *(gradient, labels == 0, gradient),
    )
    seen = []
    backend.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"].item()))
    draws = draw_epoch(97, device=DEVICE)
    backend.step_graphs = {True: None}  # a replay would run no hook
    batch = torch.ones(1, 3, 1, 1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    # The interpreted kernels would take half a minute.
    monkeypatch.setattr(cifar_fast.backends.fused, "augment", lambda *tensors, **settings: batch)
    monkeypatch.setattr(cifar_fast.backends.fused, "record", record_reference)
    for _ in range(recipe.epochs):
        for _ in backend.train_epoch(draws):
            pass
    expected = torch.tensor([recipe.learning_rate(step, 97) for step in range(1, 2329)], dtype=torch.float32)
    assert torch.equal(torch.tensor(seen), expected) and seen[-1] == 0


def test_sgd_with_zero_momentum_buffers_equals_lazy_buffers(uncompiled):
    """SGD allocates its buffers in the first step. Ours exist earlier, because a captured step must not allocate."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5), torch.randn(3, 5)
    results = []
    for prepared in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        how = dict(momentum=0.9, weight_decay=0.1, nesterov=True, fused=True)
        optimizer = torch.optim.SGD([parameter], lr=torch.full((1,), 0.1), **how)
        if prepared:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros(5)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


@pytest.mark.nightly  # two compilations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_model_compiles_without_a_graph_break(few_programs, dtype):
    """The backend compiles with ``fullgraph=True``, which raises at a graph break."""
    dataset = small_dataset(train=10, test=6)
    compiled, _ = make(dataset, dtype=dtype)
    draws = draw_epoch(10, device=DEVICE)
    ours = train(compiled, draws)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **how: function)
        plain, _ = make(dataset, dtype=dtype)
        theirs = train(plain, draws)[0]
    # The second step follows the rounding differences of the first gradients through a chaotic small network.
    for step, slack in enumerate((1, 100)):
        tolerance = slack * (1e-5 if dtype == torch.float32 else 2e-3)
        assert (ours[step] - theirs[step]).norm() <= tolerance * theirs[step].norm()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_replayed_step_equals_the_called_step_bit_for_bit(dtype):
    dataset = small_dataset(train=26, test=11)
    recipe = Recipe(epochs=1, batch_size=8)
    replayed, _ = make(dataset, recipe, getattr(torch, dtype))
    called, _ = make(dataset, recipe, getattr(torch, dtype))
    called.step_graphs, called.evaluation_graph = {True: None}, None
    draws = draw_epoch(26, device=DEVICE)
    with fastest_deterministic_convolutions():
        assert torch.equal(train(replayed, draws)[0], train(called, draws)[0])
    for name, tensor in replayed.state_dict().items():
        assert torch.equal(tensor, called.state_dict()[name]), name
    assert torch.equal(replayed.evaluate()[1], called.evaluate()[1])


@pytest.mark.gpu
def test_epoch_never_synchronizes_with_the_device():
    backend, _ = make(small_dataset(train=48, test=7), GPU_RECIPE, torch.float16)
    draws = draw_epoch(48, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = list(backend.train_epoch(draws))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(scores) == 12


def reads_on_the_host(self):
    self.state.lr.item()


def raises(self):
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("a mistake in the step")


@pytest.mark.gpu
@pytest.mark.parametrize("mistake", [pytest.param(reads_on_the_host, marks=pytest.mark.slow), raises])
def test_failed_capture_falls_back_and_leaves_the_process_usable(monkeypatch, mistake):
    step, stream = Fused.train_step, torch.cuda.current_stream()

    def broken(self):
        step(self)
        mistake(self)

    monkeypatch.setattr(Fused, "train_step", broken)
    lines = []
    result = fit(GPU_RECIPE, small_dataset(train=10, test=7), device="cuda", dtype="float16", log=lines.append)
    assert result.backend == "compiled" and len(result.rows) == GPU_RECIPE.epochs
    (said,) = [line for line in result.auto if "cannot be set up" in line]
    assert "previous error" not in said
    assert mistake is not raises or "ValueError: a mistake in the step" in said
    assert f"auto: {said}" in lines
    assert torch.cuda.current_stream() == stream
    assert sorted(torch.randperm(5, device="cuda").tolist()) == list(range(5))
    monkeypatch.undo()
    again = fit(GPU_RECIPE, small_dataset(train=10, test=7), backend="fused", device="cuda", dtype="float16", log=None)
    assert again.backend == "fused"


@pytest.mark.gpu
def test_failed_backend_is_freed_before_the_next_one_is_built(monkeypatch):
    failed, held = [], []

    def broken(self):
        failed.append(weakref.ref(self))
        raise ValueError("a mistake in the step")

    def build(self, *given):
        held.append(failed[0]() is not None)
        make(self, *given)

    make = Compiled.__init__
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(Fused, "train_step", broken)
    monkeypatch.setattr(Compiled, "__init__", build)
    result = fit(GPU_RECIPE, small_dataset(train=10, test=7), device="cuda", dtype="float16", log=None)
    assert result.backend == "compiled" and held == [False]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("where", "backend", "cure"),
    [("setting up", "auto", "train on fewer, by --train-subset"), ("training", "eager", "--batch-size 1000")],
)
def test_gpu_out_of_memory_is_one_error_line_with_its_cure(tmp_path, capsys, monkeypatch, where, backend, cure):
    npz = save_npz(tmp_path / "small.npz", small_dataset(train=2000, test=600))

    begin_epoch = Eager.begin_epoch

    def take_the_memory():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.0)

    def begin_without_memory(self, draws):
        take_the_memory()
        return begin_epoch(self, draws)

    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(Eager, "begin_epoch", begin_without_memory)
    try:
        if where == "setting up":
            take_the_memory()
        flags = f"--dataset npz --data-dir {npz} --batch-size 1000 --widths 16 16 --device cuda --dtype float16"
        assert main([*flags.split(), "--backend", backend, "--output", f"{tmp_path}/out"]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "out of memory" in error and error.count("\n") == 1
    assert cure in error and not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_stopped_training_resumes_in_new_graphs_with_the_same_bits(tmp_path):
    dataset = small_dataset(train=10, test=7)
    how = dict(backend="fused", device="cuda", dtype="float16", runs=2)
    lines = []

    def stop_in_the_last_epoch(line):
        lines.append(line)
        if sum(line.startswith("epoch") for line in lines) == 2 * GPU_RECIPE.epochs:
            raise KeyboardInterrupt

    whole = fit(GPU_RECIPE, dataset, log=None, **how)
    with pytest.raises(KeyboardInterrupt):
        fit(GPU_RECIPE, dataset, output=tmp_path / "out", log=stop_in_the_last_epoch, **how)
    parts = fit(GPU_RECIPE, dataset, resume=tmp_path / "out", log=lines.append, **how)
    assert any(line.endswith("after epoch 1") for line in lines)
    assert [row.train_loss for row in parts.rows] == [row.train_loss for row in whole.rows]
    assert [row.test_accuracy for row in parts.rows] == [row.test_accuracy for row in whole.rows]
    assert all(torch.equal(parts.state_dict[name], tensor) for name, tensor in whole.state_dict.items())


@pytest.mark.gpu
def test_dropped_backend_frees_its_memory_without_the_garbage_collector():
    # Workspaces and compiled code stay in memory after the first backend.
    make(small_dataset(train=10, test=7), GPU_RECIPE, torch.float16)
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        backend, _ = make(small_dataset(train=10, test=7), GPU_RECIPE, torch.float16)
        assert torch.cuda.memory_allocated() > before
        dropped = weakref.ref(backend)
        del backend
        assert dropped() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_backends_on_two_gpus_give_the_same_loss_in_either_order(order):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU is here")
    losses = [
        fit(GPU_RECIPE, small_dataset(train=10, test=7), backend="fused", device=f"cuda:{i}", log=None)
        .rows[-1]
        .train_loss
        for i in order
    ]
    assert losses[0] == losses[1]
