"""The augmentation as docs/porting.md writes it for other libraries makes the recipe's images."""

import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cifar_fast import Recipe
from cifar_fast.data.augment import Draws, augment
from cifar_fast.data.tensors import Normalization
from tests.helpers import ROOT, cells

PORTING = (ROOT / "docs/porting.md").read_text().split("## The augmentation in other libraries")[1].split("\n## ")[0]
TABLE = cells(PORTING.splitlines())
IMAGES = 400
IMAGE = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NORMALIZATION = Normalization.of(IMAGE[None])
MEAN, STD = NORMALIZATION.mean.tolist(), NORMALIZATION.std.tolist()


def steps(library, **names):
    """Return the operations of ``library`` in the order of the table, evaluated with ``names``."""
    codes = [row[2].strip("`") for row in TABLE if row[0] == library and len(row) == 3]
    assert len(codes) == 4
    return [step for code in codes for step in eval(f"[{code}]", {"mean": MEAN, "std": STD, **names})]


def torchvision():
    from torchvision.transforms import v2

    transform = v2.Compose(steps("torchvision", v2=v2, torch=torch))
    return torch.stack([transform(IMAGE.permute(2, 0, 1)) for _ in range(IMAGES)])


def kornia():
    K = pytest.importorskip("kornia.augmentation", reason="kornia is not installed")
    return K.AugmentationSequential(*steps("kornia", K=K))(IMAGE.permute(2, 0, 1).float().repeat(IMAGES, 1, 1, 1))


def albumentations():
    A = pytest.importorskip("albumentations", reason="albumentations is not installed")
    transform = A.Compose(steps("albumentations", A=A), seed=0)
    images = np.stack([transform(image=IMAGE.numpy())["image"] for _ in range(IMAGES)])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def dali():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def, types

    codes = [row[2].strip("`") for row in TABLE if row[0] == "DALI" and len(row) == 3]

    @pipeline_def(batch_size=IMAGES, num_threads=1, device_id=None, seed=0)
    def pipeline():
        x = fn.external_source(source=lambda: [IMAGE.numpy()] * IMAGES, layout="HWC")
        for code in codes:
            x = eval(code, {"fn": fn, "types": types, "mean": MEAN, "std": STD, "x": x})
        return x

    return torch.from_numpy(pipeline().run()[0].as_array()).permute(0, 3, 1, 2)


def example():
    """Return images that examples/loader_speed.py makes with torchvision."""
    from PIL import Image

    namespace = runpy.run_path(str(ROOT / "examples/loader_speed.py"))
    transform = namespace["torchvision_transform"](NORMALIZATION.mean, NORMALIZATION.std)
    return torch.stack([transform(Image.fromarray(IMAGE.numpy())) for _ in range(IMAGES)])


def choices(images):
    """Return the draws with which the recipe makes ``images`` of IMAGE, if it can.

    Crop and mirror are those whose image differs in the fewest pixels. These pixels are the cutout's.
    """
    crop, flip = torch.arange(25).repeat(2), torch.arange(2).repeat_interleave(25)
    zeros = torch.zeros_like(crop)
    uncut = recipe_images(Draws(torch.stack((zeros, crop, flip, zeros))), Recipe(cutout_size=0))
    red = uncut[:, 0].contiguous()
    different = torch.stack([(red - image[0]).abs() > 1e-3 for image in images])  # [N, 50, 32, 32]
    best = different.sum(dim=(2, 3)).argmin(dim=1)
    square = different[torch.arange(len(images)), best].byte()
    top, left = (square.amax(dim=dim).argmax(dim=1).clamp(max=24) for dim in (2, 1))
    return Draws(torch.stack((torch.zeros_like(best), crop[best], flip[best], left * 25 + top)))


def recipe_images(draws, recipe=None):
    normalized = NORMALIZATION.apply(IMAGE[None], torch.float32)
    return augment(normalized, draws, recipe or Recipe())


@pytest.mark.parametrize("library", [torchvision, kornia, albumentations, dali, example])
def test_other_libraries_make_the_images_of_the_recipe(library):
    torch.manual_seed(0)
    images = library()
    draws = choices(images)
    stated = {row[0].lower(): float(row[3]) for row in TABLE if len(row) == 4 and row[3][0].isdigit()}
    error = float((images - recipe_images(draws)).abs().max())
    assert error <= stated.get(library.__name__, 1e-6)
    for places, expected in ((draws.crop, 25), (draws.flip, 2), (draws.cutout // 25, 25), (draws.cutout % 25, 25)):
        counts, mean = torch.bincount(places, minlength=expected), IMAGES / expected
        assert len(counts) == expected and (counts - mean).abs().max() < 5 * mean**0.5 and counts.min() > 0, counts


def test_other_crops_and_the_other_order_make_other_images():
    def crops(image, *padding):
        padded = F.pad(image[None], padding, mode="reflect")[0]
        places = range(padded.shape[1] - 31), range(padded.shape[2] - 31)
        return [padded[:, y : y + 32, x : x + 32] for y in places[0] for x in places[1]]

    def shared(images):
        return f"{len({image.numpy().tobytes() for image in images} & of_recipe)} of {len(images)}"

    image = IMAGE.permute(2, 0, 1).float()
    crop_first = [made for crop in crops(image, 4, 0, 4, 0) for made in (crop, crop.flip(2))]
    mirror_first = [crop for made in (image, image.flip(2)) for crop in crops(made, 4, 0, 4, 0)]
    of_recipe = {made.numpy().tobytes() for made in crop_first}
    assert f"{shared(mirror_first)} equally likely images are the recipe's" in " ".join(PORTING.split())
    assert f"{shared(crops(image, 4, 4, 4, 4))} places are the recipe's" in " ".join(PORTING.split())
