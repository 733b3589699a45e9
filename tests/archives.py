"""CIFAR-10 and CIFAR-100 as they are published, with images of one's own: an archive of pickled batches.

torchvision reads them as it reads the real ones; only the MD5 sums that it expects are others.
"""

import hashlib
import pickle
import tarfile

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def write_archive(root, name, dataset):
    """Write the archive of data set ``name`` into ``root``; gives the attributes of torchvision's class that go with
    it.
    """
    kind = KINDS[name]
    files = {}
    for split in ("train", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        names = [file for file, _ in getattr(kind, f"{split}_list")]
        for file, part in zip(names, np.array_split(np.arange(len(images)), len(names))):
            planes = images[part].transpose(0, 3, 1, 2).reshape(len(part), 3072)
            files[file] = {"data": np.ascontiguousarray(planes), "filenames": [f"{i}.png" for i in part]}
            if name == "cifar10":
                files[file] |= {"labels": labels[part].tolist(), "batch_label": file}
            else:
                files[file] |= {"fine_labels": labels[part].tolist(), "coarse_labels": (labels[part] // 5).tolist()}
    names = list(dataset.class_names)
    files[kind.meta["filename"]] = {kind.meta["key"]: names} | (
        {} if name == "cifar10" else {"coarse_label_names": names[::5]}
    )

    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    sums = {}
    for file, content in files.items():
        data = pickle.dumps(content, protocol=2)
        (folder / file).write_bytes(data)
        sums[file] = hashlib.md5(data).hexdigest()
    archive = root / kind.filename
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, f"{kind.base_folder}/{file.name}")
            file.unlink()
    folder.rmdir()
    return {
        "train_list": [(file, sums[file]) for file, _ in kind.train_list],
        "test_list": [(file, sums[file]) for file, _ in kind.test_list],
        "meta": kind.meta | {"md5": sums[kind.meta["filename"]]},
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
    }
