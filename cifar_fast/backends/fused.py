"""The fused backend: our kernels, torch.compile for the rest, and on a GPU a whole step in one CUDA graph.

Everything that a step needs lies on the device: the data set as bytes, the epoch's draws, the learning rate of each
step of the run, and the number of the step. One call of ``step`` reads that number, trains on its batch, files the
losses under it, leaves it one higher and the next rate in its place. It takes nothing from the host and gives nothing
back, so that it is captured once and an epoch is its draws and a replay a step. Without a GPU, under Triton's
interpreter, the same function is called instead of replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from cifar_fast.backends.base import Resumable, compile_loss_fn, evaluate_by_batches, make_sgd, warm_up_draws
from cifar_fast.data.augment import Draws
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.tensors import PADDED_CHANNELS, byte_tensors
from cifar_fast.kernels import BatchNormCELU2d, StepState, augment, cross_entropy, record
from cifar_fast.model import CNN, make_model
from cifar_fast.recipe import IMAGE_CHANNELS, Recipe

if TYPE_CHECKING:
    from cifar_fast.model import CustomModel


WARM_UP = 3
"""Runs before a capture: the first compiles, and the others find cuDNN's choices and the allocator's memory in place.
"""


class Fused(Resumable):
    """The same network with fused kernels; weights and their names are those of the plain model.

    ``custom_model``, where it is given, stands in its place as it is: with augmentation and loss by our kernels, the
    compiler's for the rest.
    """

    name = "fused"

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        custom_model: CustomModel | None = None,
    ) -> None:
        self.recipe, self.device, self.dtype, self.memory_format = recipe, device, dtype, memory_format
        self.custom_model, self.channels = custom_model, PADDED_CHANNELS if custom_model is None else IMAGE_CHANNELS
        n, size = len(dataset.train_images), recipe.batch_size
        self.steps = n // size
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.data, self.table = byte_tensors(dataset, device, dtype, self.channels)
        self.draws = warm_up_draws(n, device)
        rates = [recipe.learning_rate(step + 1, self.steps) for step in range(recipe.epochs * self.steps)]
        self.schedule = torch.tensor(rates, dtype=torch.float32, device=device)
        self.rate = torch.zeros(1, dtype=torch.float32, device=device)
        self.done = torch.zeros(1, dtype=torch.int64, device=device)  # steps of this run
        self.position = torch.zeros_like(self.done)  # the same, of this epoch
        self.correct = torch.zeros(self.steps, size, dtype=torch.bool, device=device)
        self.test_correct = torch.zeros(len(dataset.test_images), dtype=torch.bool, device=device)
        self.test_batch = evaluation_batch(len(dataset.test_images), size)

        # The compiled code and the graphs hold this model's tensors; each run copies its weights into them.
        self.model = make_model(recipe, dataset, device, dtype, custom_model, fuse).to(memory_format=memory_format)
        if custom_model is None and not any(isinstance(layer, BatchNormCELU2d) for layer in self.model.modules()):
            self.remarks = [
                "fused: its norm kernel is for batch norm with CELU; here the compiler's kernels take its place"
            ]
        outputs, scale = (self.model, 1.0) if custom_model else (cast(CNN, self.model).outputs, recipe.output_scale)
        self.score = compile_loss_fn(make_head(outputs, scale, recipe, device, dtype))
        loss_dtype = torch.float16 if dtype == torch.float16 else torch.float32
        self.losses = torch.zeros(self.steps, size, dtype=loss_dtype, device=device)
        # On a CPU torch 2.11's fused SGD is wrong in half precision.
        self.optimizer = make_sgd(self.model, recipe, lr=self.rate, fused=device.type == "cuda")
        for parameter in self.model.parameters():
            # A captured step must not allocate momentum. Starting from zeros equals SGD's lazy start (dampening 0).
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.seek(0)
        self.step_graph, self.evaluation_graph = self._capture(self.step), self._capture(self.eval_step)

    def reset(self, model: nn.Module) -> None:
        self.epoch = 0
        self.model.load_state_dict(model.state_dict())
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        self.seek(0)

    def train_epoch(self, draws: Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.draws.tensor.copy_(draws.tensor)
        self.seek(self.epoch % self.recipe.epochs * self.steps)
        self.epoch += 1
        for i in range(self.steps):
            self.step_graph.replay() if self.step_graph else self.step()
            yield self.losses[i], self.correct[i]

    def evaluate(self) -> torch.Tensor:
        self.evaluation_graph.replay() if self.evaluation_graph else self.eval_step()
        return self.test_correct

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def seek(self, done: int) -> None:
        """Make the step ready that follows ``done`` steps of the run, the first of an epoch."""
        self.done.fill_(done)
        self.position.zero_()
        self.rate.copy_(self.schedule[done : done + 1])

    def step(self) -> None:
        """The training step whose number lies on the device, as it is captured."""
        recipe = self.recipe
        self.model.train()
        images, labels = augment(
            self.data.train_images,
            self.draws.tensor,
            self.table,
            labels=self.data.train_labels,
            step=self.position,
            batch_size=recipe.batch_size,
            out_channels=self.channels,
            padding=recipe.crop_padding,
            cutout_size=recipe.cutout_size,
        )
        outputs, loss, correct, gradient = self.score(images, labels)
        self.model.zero_grad()
        outputs.backward(gradient)
        self.optimizer.step()
        state = StepState(self.losses, self.correct, self.schedule, self.rate, self.done, self.position)
        record(loss.to(self.losses.dtype), correct, state)  # a custom model may give another dtype

    def eval_step(self) -> None:
        """The evaluation of the test images, as it is captured."""

        def score(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            _, loss, correct, _ = self.score(images, labels)
            return loss, correct

        self.test_correct.copy_(evaluate_by_batches(self.model, score, self.data, self.test_batch))

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Run ``function`` until nothing in it is left to compile or choose; on a GPU, give the graph of a call."""
        if self.stream is None:  # no GPU
            function()
            return None
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(before)
        first_error = None
        with fastest_deterministic_convolutions():
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(WARM_UP):
                        self.seek(0)  # a run may have fewer steps
                        function()
                before.wait_stream(self.stream)
                # On the warm-up's stream, whose workspaces it shares: the default one belongs to the GPU of the
                # process's first capture.
                with torch.cuda.graph(graph, stream=self.stream):
                    try:
                        function()
                    except Exception as error:
                        first_error = error
                        raise
            except Exception as error:
                reset_after_failed_capture(before)
                raise first_error or error from None
        return graph


def evaluation_batch(n: int, batch_size: int) -> int:
    """Images per batch of an evaluation of ``n``: near four training batches, which keep more of each image, and alike
    where ``n`` allows it, since each size is compiled by itself.
    """
    return -(-n // -(-n // (4 * batch_size)))


def reset_after_failed_capture(stream: torch.cuda.Stream) -> None:
    """Make ``stream`` current again after a capture that failed, which leaves its own.

    In torch 2.11 the GPU's generator still believes in the capture then, and gives no more numbers; one that succeeds
    takes that back.
    """
    torch.cuda.set_stream(stream)
    side = torch.cuda.Stream()
    side.wait_stream(stream)
    # Where the GPU takes nothing more, the first error is the one to tell.
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
        torch.zeros(1, device=stream.device)
    torch.cuda.set_stream(stream)


Head = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def make_head(
    model: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
) -> Head:
    """As :func:`cifar_fast.backends.base.make_loss_fn`, of a ``model`` whose outputs are the logits but for ``scale``; gives
    the outputs too, and the gradient of the losses' sum with respect to them.
    """
    autocast = dtype == torch.bfloat16

    def head(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            outputs = model(images).contiguous()
        settings = dict(label_smoothing=recipe.label_smoothing, scale=scale)
        return outputs, *cross_entropy(outputs, labels, **settings)

    return head


def fuse(model: CNN) -> CNN:
    """``model`` with each (max-pool,) batch norm and CELU as one operator, for images with channels of zeros appended.
    Other norms and activations stay plain, for the compiler.

    Changes ``model`` and gives it back. Modules keep their places, and so the state dict its names.
    """
    layers = list(model.seq)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d) and isinstance(celu := layers[i + 1], nn.CELU):
            pool = layers[i - 1]
            pooled = isinstance(pool, nn.MaxPool2d)
            fused = BatchNormCELU2d(
                layer.num_features, layer.eps, layer.momentum, alpha=celu.alpha, pool=pool.kernel_size if pooled else 1
            )
            fused.load_state_dict(layer.state_dict())
            model.seq[i], model.seq[i + 1] = fused, nn.Identity()
            if pooled:
                model.seq[i - 1] = nn.Identity()
    head = len(layers) - 3  # max-pool, flatten, linear
    model.seq[head] = GlobalMaxPool2d()
    first = layers[0]
    assert isinstance(first, nn.Conv2d)
    model.seq[0] = PaddedConv2d(first, PADDED_CHANNELS)
    return model


class GlobalMaxPool2d(nn.Module):
    """The maximum over all pixels, the first where there are several, as ``[N, C, 1, 1]``.

    As one pass of the compiler's in each direction: of torch's own backward it makes three, with atomics.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [N, H W, C], as they lie in memory, and so the gradient will
        first = pixels.argmax(dim=1, keepdim=True)
        chosen = torch.arange(pixels.shape[1], device=x.device)[:, None] == first
        return torch.where(chosen, pixels, 0).sum(dim=1)[..., None, None]


class PaddedConv2d(nn.Conv2d):
    """A convolution for images with channels of zeros after their own, with a weight of zeros for them.

    They stay zeros in training: so is their gradient. The state dict is that of the convolution without them.
    """

    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        how: dict[str, Any] = dict(kernel_size=conv.kernel_size, padding=conv.padding, bias=False, device="meta")
        super().__init__(channels, conv.out_channels, **how)
        self.in_channels = conv.in_channels
        self.weight = nn.Parameter(self.pad(conv.weight.detach()))
        self.register_state_dict_post_hook(self._cut)
        self.register_load_state_dict_pre_hook(self._pad)

    def pad(self, weight: torch.Tensor) -> torch.Tensor:
        return F.pad(weight, (0, 0, 0, 0, 0, self.weight.shape[1] - weight.shape[1]))

    @staticmethod
    def _cut(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, metadata: dict[str, Any]) -> None:
        assert isinstance(module, PaddedConv2d)
        name = f"{prefix}weight"
        state_dict[name] = state_dict[name][:, : module.in_channels].contiguous()

    @staticmethod
    def _pad(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
        assert isinstance(module, PaddedConv2d)
        name = f"{prefix}weight"
        if name in state_dict:
            state_dict[name] = module.pad(state_dict[name])


@contextlib.contextmanager
def fastest_deterministic_convolutions() -> Iterator[None]:
    """Have cuDNN time the algorithms that give the same bits each time, and take the fastest for each shape."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark = cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
