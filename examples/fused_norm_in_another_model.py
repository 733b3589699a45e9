"""Use the fused max-pool + batch norm + activation in a network of your own, and check that it computes the same.

    python examples/fused_norm_in_another_model.py    # on a CUDA GPU, or on a CPU with a C++ compiler

``BatchNormAct2d(channels, activation="silu", pool=2)`` replaces ``MaxPool2d(2)``, ``BatchNorm2d(channels)`` and
``SiLU()``. Other activations are celu, relu, gelu, gelu_tanh and none. It computes in channels_last, has the state dict
of ``BatchNorm2d``, and works under ``torch.compile(fullgraph=True)``.
"""

from collections.abc import Callable

import torch
from torch import nn

from cifar_fast.kernels import BatchNormAct2d

BATCH, SIZE, CLASSES = 4, 8, 5


def plain_block(c_in: int, c_out: int, pool: int) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return [conv, nn.MaxPool2d(pool), nn.BatchNorm2d(c_out), nn.SiLU()]


def fused_block(c_in: int, c_out: int, pool: int) -> list[nn.Module]:
    # Identities keep the indices of the modules, so that the weights have the same names as in the plain network.
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return [conv, nn.Identity(), BatchNormAct2d(c_out, activation="silu", pool=pool), nn.Identity()]


def network(block: Callable[[int, int, int], list[nn.Module]]) -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)]
    return nn.Sequential(*block(3, 8, 1), *block(8, 16, 2), *head)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # so that the convolutions of both networks are accurate
    plain = network(plain_block).to(device).to(memory_format=torch.channels_last)
    fused = network(fused_block).to(device).to(memory_format=torch.channels_last)
    fused.load_state_dict(plain.state_dict())

    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (BATCH,), device=device)
    for name, model in (("plain", plain), ("fused", fused)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(f"{loss.item():.6f}")
        print(f"{name}: losses {' '.join(losses)}")

    plain.eval()
    fused.eval()
    with torch.no_grad():
        pairs = zip(plain.parameters(), fused.parameters())
        worst = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
        difference = (plain(images) - fused(images)).abs().max().item()
    print(f"after three steps the weights differ by {worst:.1e} of their norm at most")
    print(f"in evaluation the outputs differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
