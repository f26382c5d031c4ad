"""Makes what the four digits releases need beside the trained models, from data/digits-calib.npz and the version 2 model:

    golden/            golden cases: real digits the models never saw as test images, with the labels people gave them
    models/digits-v4-fixed-batch.onnx
                       version 2 exported the wrong way: its batch is fixed at 1, so an app that sends 8 images gets errors

Run `python examples/digits/make_assets.py` after a new training; its output is committed.
"""

from pathlib import Path

import numpy as np
import onnx

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
BATCH = 64
SINGLES = 4


def save(path: Path, **arrays: np.ndarray) -> None:
    """np.savez with a fixed order and no time stamps worth speaking of: equal arrays give files of equal content."""
    np.savez_compressed(path, **arrays)
    print(f"{path.relative_to(HERE)}  {path.stat().st_size} bytes")


def golden() -> None:
    GOLDEN.mkdir(exist_ok=True)
    data = np.load(HERE / "data/digits-calib.npz")
    images = (data["image_u8"].astype(np.float32) * data["scale"])[:, None]
    save(GOLDEN / "batch.in.npz", image=images[:BATCH])
    save(GOLDEN / "batch.labels.npz", probs=data["label"][:BATCH].astype(np.int64))
    for index in range(SINGLES):
        save(GOLDEN / f"single{index}.in.npz", image=images[index : index + 1])
        save(GOLDEN / f"single{index}.labels.npz", probs=data["label"][index : index + 1].astype(np.int64))


def fixed_batch() -> None:
    model = onnx.load(HERE / "models/digits-v2-int8-qdq.onnx")
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.checker.check_model(model, full_check=True)
    path = HERE / "models/digits-v4-fixed-batch.onnx"
    onnx.save(model, path)
    print(f"{path.relative_to(HERE)}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    golden()
    fixed_batch()
