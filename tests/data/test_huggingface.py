"""Data sets of a local Hugging Face Hub on the loopback address."""

import http.server
import io
import json
import sys
import threading
import types

import numpy as np
import pytest
from PIL import Image

from cifar_fast import InputError, load_dataset
from cifar_fast.train import main
from tests.helpers import small_dataset

TINY = "--widths 4 8 8 8 16 32 32 32 --epochs 1 --batch-size 32 --device cpu --dtype float32 --backend eager"
NAMES = ["ant", "bee", "cat"]
USUAL = {"plain_text/train-00000-of-00001.parquet": "train", "plain_text/test-00000-of-00001.parquet": "test"}
CARD = """---
configs:
- config_name: other
  data_files: "*.parquet"
- config_name: mine
  default: true
  data_files:
  - split: train
    path: [a-*.parquet, more/**]
  - split: test
    path: b.parquet
  - split: noise
    path: train.parquet
---
train.parquet is not for training.
"""


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub with one data set, "someone/images". A test may change its attributes:

    * ``files``: text, or the split in a parquet file, by name;
    * ``columns``: columns of the tables, and what they hold;
    * ``names``: class names of each split, None for a table without metadata.
    """
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: the extra hf")
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra hf")
    parquet_files = pytest.importorskip("pyarrow.parquet")

    made = types.SimpleNamespace(
        small=small_dataset(96, 40, 3),
        files=dict(USUAL),
        columns={"img": "images", "label": "labels"},
        names={"train": NAMES, "test": NAMES},
    )
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])

    def parquet(split):
        images, labels = getattr(made.small, f"{split}_images"), getattr(made.small, f"{split}_labels")
        names = made.names[split]
        content = {"images": pyarrow.array([{"bytes": png(image), "path": None} for image in images], kind)}
        numbers = [names.index(name) if name in names else NAMES.index(name) for name in NAMES] if names else range(3)
        content["labels"] = pyarrow.array([numbers[label] for label in labels])
        content["text"] = pyarrow.array([NAMES[label] for label in labels])
        content["ids"] = pyarrow.array(range(len(labels)))
        features = {name: {"names": names, "_type": "ClassLabel"} for name in made.columns if "label" in name}
        table = pyarrow.table({name: content[what] for name, what in made.columns.items()})
        file = io.BytesIO()
        about = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
        parquet_files.write_table(table.replace_schema_metadata(about), file)
        return file.getvalue()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path, body, found = self.path.split("?")[0], b"", False
            name = path.partition("/resolve/")[2].partition("/")[2]
            if path.startswith("/api/datasets/someone/images/tree"):
                entries = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in made.files]
                body, found = json.dumps(entries).encode(), True
            elif path.startswith("/api/datasets/someone/images"):
                names = [{"rfilename": name} for name in made.files]
                body, found = json.dumps({"id": "someone/images", "sha": "0" * 40, "siblings": names}).encode(), True
            elif path.startswith("/datasets/someone/images/resolve/") and name in made.files:
                content = made.files[name]
                body, found = parquet(content) if content in ("train", "test") else content.encode(), True
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"' + str(hash(path)) + '"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    # The client reads its environment at import, so it must be imported again.
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.chdir(tmp_path)
    yield made
    server.shutdown()
    server.server_close()


def load(lines=None):
    return load_dataset("hf:someone/images", log=None if lines is None else lines.append)


def refused(words):
    with pytest.raises(InputError, match=r"(?s)^hf:someone/images(?!.*\n)") as caught:
        load()
    assert words in str(caught.value)


@pytest.mark.slow
def test_hub_dataset_trains(hub, tmp_path):
    assert main([*TINY.split(), "--dataset", "hf:someone/images"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("hf-someone-images-")
    metadata = json.loads((folder / "summary.json").read_text())["dataset"]
    assert metadata["digest"] == hub.small.digest and metadata["class_names"] == NAMES


@pytest.mark.parametrize(
    ("changed", "name", "words"),
    [
        ({"fine": "labels", "coarse": "labels"}, "someone/images", "one of labels are needed, not img, fine, coarse"),
        ({}, "someone/else", "hf:someone/else: cannot be read"),
    ],
)
def test_unreadable_hub_dataset_is_reported_in_one_line(hub, capsys, changed, name, words):
    if changed:
        del hub.columns["label"]
        hub.columns |= changed
    assert main([*TINY.split(), "--dataset", f"hf:{name}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and words in last


def test_missing_hub_package_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"hf:a/b needs huggingface_hub: pip install 'cifar_fast\[hf\]'"):
        load_dataset("hf:a/b")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001-0123456789abcdef.parquet", "data/test-00000-of-00001-0123456789abcdef.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("x/train/part/a.parquet", "x/test.parquet"),
        ("train_test_split/train.parquet", "train_test_split/test.parquet"),
    ],
)
def test_files_named_after_splits_are_read(hub, train, test):
    hub.files = {train: "train", test: "test"}
    lines = []
    assert load(lines).digest == hub.small.digest
    assert not [line for line in lines if "left out" in line]


def test_files_of_similar_names_are_left_out_with_a_line(hub):
    others = ("test_corrupted", "train_noisy", "train-0", "trainer", "my-train", "validation-00000-of-00001")
    hub.files = dict.fromkeys((f"{name}.parquet" for name in others), "train")
    hub.files |= {"train_test_split/x.parquet": "test", "train.parquet": "train", "test.parquet": "test"}
    lines = []
    assert load(lines).digest == hub.small.digest
    (line,) = [line for line in lines if "left out" in line]
    assert line.endswith(
        "left out: my-train.parquet, test_corrupted.parquet, train-0.parquet, train_noisy.parquet, "
        "train_test_split/x.parquet and 2 more"
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("train_noisy test", "no parquet file of the split 'train' among its 2 files (splits: test)"),
        ("train other", "no parquet file of the split 'test'"),
        ("a/train a/test b/train b/test", "has several configurations (a/train, b/train)"),
        ("a/train b/test", "has its splits in several folders (a/, b/)"),
        ("train train/0 test", "has several configurations (train, train/)"),
        ("train train-00000-of-00001 test", "has several configurations (train, train-N-of-00001)"),
        ("train-0-of-1 train-0-of-2 train-1-of-2 test", "has several configurations"),
        ("train-0-of-3 train-2-of-3 test", "train-*-of-* must be 3 files, but has the numbers [0, 2]"),
        ("train/test train test", "train/test.parquet is named after both splits"),
        ("train/0 test/train/0", "test/train/0.parquet is named after both splits"),
    ],
)
def test_splits_that_could_be_read_in_several_ways_are_refused(hub, files, words):
    hub.files = {f"{name}.parquet": "train" for name in files.split()}
    refused(words)


def test_card_tells_the_files_of_a_split(hub):
    hub.files = {"a-0.parquet": "train", "more/x/y.parquet": "train", "b.parquet": "test", "train.parquet": "test"}
    hub.files["README.md"] = CARD
    lines = []
    dataset = load(lines)
    assert np.array_equal(dataset.train_images, np.concatenate([hub.small.train_images] * 2))
    assert np.array_equal(dataset.test_labels, hub.small.test_labels)
    (line,) = [line for line in lines if "left out" in line]
    assert line.endswith("left out: train.parquet")


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("data_files: {train: a.parquet, test: a.parquet}", "a.parquet belongs to both splits"),
        ("data_files: {train: '*.parquet', test: b.parquet}", "b.parquet belongs to both splits"),
        ("data_files: '*.parquet'", "no parquet file of the split 'test' among its 4 files (splits: train)"),
        ("data_files: {train: c.parquet, test: b.parquet}", "names 'c.parquet' in data_files, which is none of its"),
        ("data_files: {train: x.csv, test: b.parquet}", "x.csv, of the split 'train', is not a parquet file"),
        ("data_files: [{path: a.parquet}]", "each of data_files in its README.md must have a split and a path"),
        ("config_name: one\n- config_name: two", "several configurations (one, two), none of them the default"),
        ("data_dir: none", "no parquet file of the split 'train'"),
    ],
)
def test_card_that_names_no_clear_splits_is_refused(hub, card, words):
    hub.files = {"a.parquet": "train", "b.parquet": "test", "x.csv": "text"}
    hub.files["README.md"] = f"---\nconfigs:\n- {card}\n---\n"
    refused(words)


def test_card_may_name_a_folder(hub):
    hub.files = {f"{folder}/{split}.parquet": split for folder in ("one", "two") for split in ("train", "test")}
    hub.files["README.md"] = (
        "---\nconfigs:\n- {config_name: x, data_dir: one}\n- {config_name: default, data_dir: two}\n---\n"
    )
    lines = []
    assert load(lines).digest == hub.small.digest
    assert any(line.endswith("left out: one/test.parquet, one/train.parquet") for line in lines)


@pytest.mark.parametrize("text", ["# Images\n", "---\nlicense: mit\n---\n"])
def test_card_without_configurations_changes_nothing(hub, text):
    hub.files["README.md"] = text
    assert load().digest == hub.small.digest


@pytest.mark.parametrize(
    ("train", "test"), [("ant bee cat", "cat ant bee"), ("cat bee ant", "bee cat ant dog"), ("bee cat ant", None)]
)
def test_classes_of_both_splits_are_compared_by_name(hub, train, test):
    hub.names = {"train": train.split(), "test": test and test.split()}
    dataset = load()
    assert dataset.class_names == tuple(train.split())
    assert [dataset.class_names[label] for label in dataset.train_labels[:3]] == NAMES
    assert test is None or [dataset.class_names[label] for label in dataset.test_labels[:3]] == NAMES


def test_class_of_the_test_split_alone_is_refused(hub):
    hub.names["train"] = ["ant", "bee", "cat"]
    hub.names["test"] = ["ant", "bee", "dog"]
    refused("test: the class 'dog' is none of the classes ant, bee, cat")


def test_names_of_the_card_are_read_by_their_numbers(hub):
    hub.names = {"train": None, "test": None}
    names = {"0": "ant", "2": "cat", "1": "bee"}
    features = [{"name": "img", "dtype": "image"}, {"name": "label", "dtype": {"class_label": {"names": names}}}]
    hub.files["README.md"] = f"---\n{json.dumps({'dataset_info': {'features': features}})}\n---\n"
    assert load().class_names == tuple(NAMES)


@pytest.mark.parametrize(
    ("columns", "named", "words"),
    [
        ({"label": "text", "id": "ids"}, False, "one of labels are needed, not img, label, id; labels are integers"),
        ({"path": "text", "width": "ids"}, False, "one of labels are needed, not img, path, width"),
        ({"label": "labels", "fine_label": "labels"}, True, "one of labels are needed"),
        ({"fine": "labels", "coarse": "labels"}, False, "one of labels are needed"),
        ({"img2": "images", "label": "labels"}, True, "one column of images"),
    ],
)
def test_columns_that_may_not_be_labels_are_refused(hub, columns, named, words):
    hub.columns = {"img": "images"} | columns
    if not named:
        hub.names = {"train": None, "test": None}
    refused(words)


@pytest.mark.parametrize(
    ("columns", "named", "line"),
    [
        ({"target": "labels"}, False, []),
        ({"label": "labels", "id": "ids", "path": "text"}, False, ["'label', not 'id'"]),
        ({"the_label": "labels", "id": "ids"}, True, ["'the_label', not 'id'"]),
        ({"coarse_label": "ids", "fine_label": "labels"}, True, ["'fine_label', not 'coarse_label'"]),
    ],
)
def test_column_of_labels_is_the_declared_one_or_has_a_usual_name(hub, columns, named, line):
    hub.columns = {"img": "images"} | columns
    if not named:
        hub.names = {"train": None, "test": None}
    lines = []
    assert load(lines).digest == hub.small.digest
    about = "hf:someone/images: the labels are the column "
    assert [text.removeprefix(about) for text in lines if text.startswith(about)] == line


def test_validation_is_the_test_split_of_a_data_set_without_one(hub):
    hub.files, lines = {"train.parquet": "train", "validation.parquet": "test"}, []
    assert len(load(lines).test_images) == len(hub.small.test_images)
    assert "hf:someone/images: has no split test; the 40 images of validation are tested on" in lines
    hub.files = {"train.parquet": "train"}
    dataset = load_dataset("hf:someone/images", test_fraction=0.25, log=None)
    assert (len(dataset.train_images), len(dataset.test_images)) == (72, 24)
