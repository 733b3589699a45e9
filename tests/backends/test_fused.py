"""The fused backend's device-side bookkeeping: on the CPU the step runs uncaptured, its kernels under Triton's
interpreter.
"""

import copy
import gc
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

import cifar_fast.backends.fused
from cifar_fast import CNN, InputError, Recipe, draw_epoch, fit
from cifar_fast.backends.eager import Compiled, Eager
from cifar_fast.backends.fused import (
    PADDED_CHANNELS,
    Fused,
    GlobalMaxPool2d,
    fastest_deterministic_convolutions,
    fuse,
)
from cifar_fast.backends.select import resolve_backend
from cifar_fast.data.tensors import device_data
from cifar_fast.kernels.record_step import record_reference
from cifar_fast.train import main
from tests.helpers import DEVICE, NARROW, save_npz, small_dataset

GPU_RECIPE = Recipe(epochs=2, batch_size=4, widths=(4, 8, 8, 16))
"""As that of test_replay.py: on a stand-in for a GPU each kernel of another shape takes seconds the first time."""
RECIPE = Recipe(epochs=2, batch_size=4, widths=NARROW)


def make(dataset, recipe=RECIPE, dtype=torch.float32, seed=0):
    """A fused backend at the start of a run, and the plain model whose weights it has."""
    torch.manual_seed(seed)
    model = CNN(recipe, dataset.num_classes)
    backend = Fused(recipe, device_data(dataset, DEVICE), DEVICE, dtype, torch.channels_last)
    backend.reset(model)
    return backend, model


def momenta(backend):
    return [backend.optimizer.state[parameter]["momentum_buffer"] for parameter in backend.model.parameters()]


def train(backend, draws):
    """All losses and answers of an epoch, copied."""
    losses, corrects = zip(*((loss.clone(), correct.clone()) for loss, correct in backend.train_epoch(draws)))
    return torch.stack(losses), torch.stack(corrects)


def test_the_fused_model_has_the_plain_models_state_dict_both_ways():
    plain = CNN(RECIPE, 3)
    fused = fuse(copy.deepcopy(plain))
    theirs, ours = plain.state_dict(), fused.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = CNN(RECIPE, 3)
    fused.load_state_dict(other.state_dict())
    plain.load_state_dict(fused.state_dict())
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    assert tuple(ours["seq.0.weight"].shape) == (4, 3, 3, 3), "a person sees three colors"


def test_every_norm_activation_and_pool_is_replaced():
    layers = [type(layer).__name__ for layer in fuse(CNN(Recipe(), 10)).seq]
    assert layers.count("BatchNormCELU2d") == 8 and layers.count("PaddedConv2d") == 1 and layers.count("Conv2d") == 7
    assert not {"BatchNorm2d", "CELU", "MaxPool2d"} & set(layers) and layers.count("GlobalMaxPool2d") == 1
    assert [layer.pool for layer in fuse(CNN(Recipe(), 10)).seq if hasattr(layer, "pool")] == [1, 2, 1, 1, 2, 2, 1, 1]


def test_channels_of_zeros_change_the_first_convolution_by_rounding_only():
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
def test_the_heads_pool_is_torchs_with_its_gradient(values):
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
    assert values == "NaN" or torch.equal(our_gradient, gradient)  # of several NaN torch takes the last


@pytest.mark.slow  # the interpreter
def test_set_up_leaves_no_trace(uncompiled, few_programs):
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
    assert all(not momentum.any() for momentum in momenta(backend)) and backend.global_step.item() == 0


@pytest.mark.slow  # the interpreter
def test_set_up_does_run_the_step_whose_trace_is_taken_back(uncompiled, few_programs, monkeypatch):
    """Else the test before this one would pass of itself."""
    monkeypatch.setattr(Fused, "reset", lambda self, model: None)
    backend, model = make(small_dataset(train=10, test=6))
    assert backend.global_step.item() > 0 and any(momentum.any() for momentum in momenta(backend))
    assert not torch.equal(backend.state_dict()["seq.0.weight"].cpu(), model.state_dict()["seq.0.weight"])


@pytest.mark.slow  # the interpreter
def test_a_second_run_is_the_one_that_a_fresh_backend_gives(uncompiled, few_programs):
    dataset = small_dataset(train=10, test=6)
    draws = [draw_epoch(10, device=DEVICE) for _ in range(2)]
    backend, model = make(dataset)
    first = [train(backend, drawn)[0] for drawn in draws]
    scores = backend.evaluate().clone()
    weights = {name: tensor.clone() for name, tensor in backend.state_dict().items()}
    assert not torch.equal(first[0], first[1])
    backend.reset(model)
    again = [train(backend, drawn)[0] for drawn in draws]
    assert torch.equal(torch.stack(first), torch.stack(again)) and torch.equal(backend.evaluate(), scores)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backend.state_dict().items())


@pytest.mark.slow  # the interpreter
def test_an_epoch_files_each_steps_losses_and_answers_where_eager_has_them(uncompiled, few_programs):
    """And takes the draws, of which two images are left over, and the test set, whose last batch is short, as eager
    does.
    """
    dataset = small_dataset(train=10, test=6)
    draws = draw_epoch(10, device=DEVICE)
    fused, model = make(dataset)
    eager = Eager(RECIPE, device_data(dataset, DEVICE), DEVICE, torch.float32, torch.contiguous_format)
    eager.reset(model)
    ours, theirs = train(fused, draws), train(eager, draws)
    assert ours[0].shape == (2, 4)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-4) and torch.equal(ours[1], theirs[1])
    assert fused.model.seq[0].weight[:, :3].all() and not fused.model.seq[0].weight[:, 3:].any(), "zeros stay zeros"
    assert torch.equal(fused.evaluate(), eager.evaluate()) and len(fused.evaluate()) == 6
    assert fused.global_step.item() == 2


@pytest.mark.nightly  # the interpreter
def test_an_epoch_that_was_left_half_way_does_not_move_the_next(uncompiled, few_programs):
    backend, _ = make(small_dataset(train=10, test=6))
    draws = draw_epoch(10, device=DEVICE)
    next(backend.train_epoch(draws))
    training = backend.train_epoch(draws)
    assert next(training) is not None
    assert (backend.global_step.item(), backend.epoch_step.item()) == (3, 1)
    assert backend.lr.item() == pytest.approx(RECIPE.learning_rate(4, 2))
    next(training)
    assert (backend.global_step.item(), backend.epoch_step.item()) == (4, 0)


@pytest.mark.slow  # 2,328 steps
def test_the_optimizer_sees_the_schedules_rate_at_each_of_the_2328_steps(uncompiled, few_programs, monkeypatch):
    """The real counter, table and optimiser of 24 epochs of 97 steps, with a model of one weight in place of the
    network.
    """
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
    backend.step_graph = None  # a replay runs no hook
    batch = torch.ones(1, 3, 1, 1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    monkeypatch.setattr(
        cifar_fast.backends.fused, "augment", lambda *tensors, **settings: batch
    )  # interpreted, half a minute
    monkeypatch.setattr(cifar_fast.backends.fused, "record", record_reference)
    for _ in range(recipe.epochs):
        for _ in backend.train_epoch(draws):
            pass
    expected = torch.tensor(
        [recipe.learning_rate(step, 97) for step in range(1, 2329)]
    )  # as float32, which is the table's type
    assert torch.equal(torch.tensor(seen), expected) and seen[-1] == 0


def test_momentum_of_zeros_is_a_first_step(uncompiled):
    """SGD makes its buffers at the first step; ours exist before, as a captured step needs."""
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


@pytest.mark.nightly  # as the training on CIFAR-10 does, in float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_compiles_without_a_break_forward_and_backward(few_programs, dtype):
    """As the backend compiles it: `fullgraph=True` raises at anything that the compiler would leave to Python."""
    dataset = small_dataset(train=10, test=6)
    compiled, _ = make(dataset, dtype=dtype)
    draws = draw_epoch(10, device=DEVICE)
    ours = train(compiled, draws)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **how: function)
        plain, _ = make(dataset, dtype=dtype)
        theirs = train(plain, draws)[0]
    for step, slack in enumerate(
        (1, 100)
    ):  # the second takes the gradients of the first through a chaotic little network
        tolerance = slack * (1e-5 if dtype == torch.float32 else 2e-3)
        assert (ours[step] - theirs[step]).norm() <= tolerance * theirs[step].norm()


# -- what cannot work


def test_without_a_gpu_and_without_the_interpreter_fused_is_refused_with_the_reason(small, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        InputError, match=r"the fused backend cannot run here \(its kernels need a CUDA GPU; .*\); choose backend"
    ):
        fit(RECIPE, small, backend="fused", device="cpu", dtype="float32", log=None)


def test_an_old_gpu_is_refused_with_the_reason(monkeypatch):
    from cifar_fast.utils.device import fused_unavailable_reason

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert fused_unavailable_reason(torch.device("cuda")) == "a GPU of compute capability 6.1, and its kernels need 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fused_unavailable_reason(torch.device("cuda")) is None


def on_hip(patch):
    patch.setattr(torch.version, "hip", "6.4")


def without_triton(patch):
    patch.setitem(sys.modules, "cifar_fast.kernels.launch", None)


def on_an_old_card(patch):
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (on_hip, "an AMD GPU, and its kernels are made for NVIDIA's"),
        (without_triton, "its kernels cannot be imported: "),
        (on_an_old_card, "a GPU of compute capability 7.0, and its kernels need 7.5"),
    ],
)
def test_what_auto_takes_on_other_machines_with_a_gpu(monkeypatch, situation, reason):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    situation(monkeypatch)
    plan = resolve_backend("auto")
    assert plan.backends == ("compiled", "eager") and plan.device.type == "cuda"
    assert f"the fused backend cannot run here ({reason}" in plan.reason and "compiled instead" in plan.reason
    with pytest.raises(InputError, match=r"the fused backend cannot run here .*; choose backend"):
        resolve_backend("fused")


def test_without_a_usable_gpu_auto_says_so(monkeypatch):
    """As with a driver too old for this torch, which warns, or with an empty CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = resolve_backend("auto")
    assert plan.backends == ("eager",) and plan.reason.startswith("no CUDA GPU is here")


def test_auto_falls_back_to_the_next_backend_and_says_so_in_a_line(small, monkeypatch):
    from cifar_fast.backends.select import BackendConfig
    from cifar_fast.training.fit import fit_plan
    from cifar_fast.utils.progress import lines_to

    def broken(*args, **how):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    backends = ("fused", "compiled", "eager")
    plan = BackendConfig(backends, torch.device("cpu"), torch.float32, torch.channels_last, "as on a GPU")
    lines = []
    recipe = Recipe(epochs=1, batch_size=32, widths=NARROW)
    with lines_to(lines.append):
        result = fit_plan(recipe, small, plan)
    assert result.backend == "eager"
    said = [line for line in lines if "cannot be set up" in line]
    assert said == [
        "auto: the fused backend cannot be set up here (RuntimeError: no compiler), compiled instead",
        "auto: the compiled backend cannot be set up here (RuntimeError: no compiler), eager instead",
    ]
    assert result.summary()["auto"] == ["as on a GPU", *(line.removeprefix("auto: ") for line in said)]
    alone = fit(recipe, small, backend="eager", device="cpu", dtype="float32", memory_format="channels_last", log=None)
    monkeypatch.undo()
    assert [row.train_loss for row in result.rows] == [row.train_loss for row in alone.rows], (
        "what failed left no trace"
    )


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_replay_is_the_uncaptured_step_bit_for_bit(dtype):
    dataset = small_dataset(train=26, test=11)
    recipe = Recipe(epochs=1, batch_size=8)
    replayed, _ = make(dataset, recipe, getattr(torch, dtype))
    called, _ = make(dataset, recipe, getattr(torch, dtype))
    called.step_graph = called.evaluation_graph = None
    draws = draw_epoch(26, device=DEVICE)
    with fastest_deterministic_convolutions():
        assert torch.equal(train(replayed, draws)[0], train(called, draws)[0])
    for name, tensor in replayed.state_dict().items():
        assert torch.equal(tensor, called.state_dict()[name]), name
    assert torch.equal(replayed.evaluate(), called.evaluate())


@pytest.mark.gpu
def test_an_epoch_does_not_wait_for_the_device():
    backend, _ = make(small_dataset(train=48, test=7), GPU_RECIPE, torch.float16)
    draws = draw_epoch(48, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = list(backend.train_epoch(draws))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(scores) == 12


def asks_the_host(self):
    """Slow because a stand-in for a GPU counts it as a fault of the whole run."""
    self.lr.item()


def raises(self):
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("a mistake in the step")


@pytest.mark.gpu
@pytest.mark.parametrize("mistake", [pytest.param(asks_the_host, marks=pytest.mark.slow), raises])
def test_a_capture_that_fails_leaves_the_process_usable_and_auto_goes_on(monkeypatch, mistake):
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
def test_what_a_failed_backend_held_is_given_back_before_the_next_is_tried(monkeypatch):
    failed, held = [], []

    def broken(self):
        failed.append(weakref.ref(self))
        raise ValueError("a mistake in the step")

    def set_up(self, *given):
        held.append(failed[0]() is not None)
        make(self, *given)

    make = Compiled.__init__
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(Fused, "train_step", broken)
    monkeypatch.setattr(Compiled, "__init__", set_up)
    result = fit(GPU_RECIPE, small_dataset(train=10, test=7), device="cuda", dtype="float16", log=None)
    assert result.backend == "compiled" and held == [False]


@pytest.mark.gpu
@pytest.mark.parametrize(("where", "backend"), [("setting up", "auto"), ("training", "eager")])
def test_a_gpu_whose_memory_runs_out_is_told_in_a_line_with_the_batch_size(
    tmp_path, capsys, monkeypatch, where, backend
):
    npz = save_npz(tmp_path / "small.npz", small_dataset(train=2000, test=600))

    def take_the_rest(*given, **how):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.0)
        return draw_epoch(*given, **how)

    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr("cifar_fast.training.trainer.draw_epoch", take_the_rest)
    try:
        if where == "setting up":
            take_the_rest(1, device="cpu")
        flags = f"--dataset npz --data-dir {npz} --batch-size 1000 --widths 16 16 --device cuda --dtype float16"
        assert main([*flags.split(), "--backend", backend, "--output", f"{tmp_path}/out"]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "out of memory" in error and error.count("\n") == 1
    assert "--batch-size 1000" in error and not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_a_training_that_was_stopped_goes_on_in_new_graphs_to_the_same_bits(tmp_path):
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
    assert "going on after epoch 1" in lines
    assert [row.train_loss for row in parts.rows] == [row.train_loss for row in whole.rows]
    assert [row.test_accuracy for row in parts.rows] == [row.test_accuracy for row in whole.rows]
    assert all(torch.equal(parts.state_dict[name], tensor) for name, tensor in whole.state_dict.items())


@pytest.mark.gpu
def test_a_backend_that_is_dropped_gives_its_memory_back_without_the_collector():
    make(
        small_dataset(train=10, test=7), GPU_RECIPE, torch.float16
    )  # what stays for all that follow: workspaces, compiled code
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
def test_a_backend_on_a_second_gpu_works_after_one_on_the_first(order):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU is here")
    losses = [
        fit(GPU_RECIPE, small_dataset(train=10, test=7), backend="fused", device=f"cuda:{i}", log=None)
        .rows[-1]
        .train_loss
        for i in order
    ]
    assert losses[0] == losses[1]
