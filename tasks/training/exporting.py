"""Export: the model as ``model.onnx``, for those who deploy it where Keras is not.

Reads ``model.keras``, ``metrics.json`` (the thresholds), ``manifest.parquet`` and the packed arrays; writes
``model.onnx``, whose metadata say what it takes and answers, and ``model.onnx.sha256``. Before it is kept, its answers
on validation images are compared with the model's.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import RunError, SettingsError
from tasks.files import read_json, sha256_of_file
from tasks.networks.files import load_network, read_checksum
from tasks.networks.twin import used_rows
from tasks.pixels.greys import to_float
from tasks.records import Facts
from tasks.runs.provenance import find_backend, read_commit
from tasks.runs.run import Run
from tasks.runs.stages import stage_task, withdraw_stage

ONNX = "model.onnx"
MAX_DIFFERENCE = 1e-4
"""Largest difference of a probability from the model's that is taken as rounding."""
N_COMPARED = 64


@stage_task("export")
def export(run: Run) -> Facts:
    """Writes the model as ONNX, if its answers are those of the model."""
    sha256 = read_checksum(run.folder)

    def make(out: Path) -> Facts:
        metrics = read_json(run.folder / "metrics.json")
        thresholds = {name: point["threshold"] for name, point in metrics["operating_points"].items()}
        model = load_network(run.folder)
        rows = used_rows(run.manifest())
        ids = list(rows.loc[rows["split"] == "val", "image_id"])
        spread = np.unique(np.linspace(0, len(ids) - 1, N_COMPARED).astype(int))  # or they would be of one class
        packed = run.images().read([ids[i] for i in spread])
        told = describe_onnx(thresholds, sha256, padded=run.settings.packing.padding)
        difference = write_onnx(model, out / ONNX, told, packed)
        checksum = sha256_of_file(out / ONNX)
        (out / f"{ONNX}.sha256").write_text(f"{checksum}  {ONNX}\n")
        return {"onnx_sha256": checksum, "max_difference": difference, "n_compared": len(packed)}

    reads = ["model.keras", "metrics.json", "manifest.parquet"]
    facts = run.stage("export", reads=reads, given={"commit": read_commit()}, make=make, packages=("tf2onnx", "onnx"))
    print(
        f"wrote {ONNX}; on {facts['n_compared']} validation images its probabilities differ from the model's by at "
        f"most {facts['max_difference']:.1g}"
    )
    return facts


def prepare_export(run: Run) -> None:
    """Refuses, before anything is trained, what could not be exported afterwards.

    What an earlier attempt exported is taken back: it is of another network, or nobody asks for it any more.

    Raises:
        SettingsError: If an export is asked for, and Keras runs on another backend than TensorFlow.
    """
    withdraw_stage(run, "export")
    if run.settings.export and (backend := find_backend()) != "tensorflow":
        raise SettingsError(
            f"export: onnx is written from TensorFlow, not {backend}; unset KERAS_BACKEND or leave it out"
        )


def describe_onnx(thresholds: dict[str, float], sha256: str, *, padded: bool) -> dict[str, str]:
    """The metadata of the file, all texts.

    Args:
        thresholds: By name of the operating point; ``balanced`` is that of the report.
        sha256: Of ``model.keras``, which is the version.
        padded: Whether pictures are padded to a square rather than stretched.
    """
    return {
        "input": "pixels: float32 (n, 224, 224, 1), grey, 0.0 black to 1.0 white; a chest X-ray, "
        + ("padded to a square" if padded else "stretched to a square, whatever its shape"),
        "output": "probability (n, 1): of pneumonia, calibrated; bacteria (n, 1): of bacteria rather than virus, "
        "meaningless without pneumonia; members (n, k): the probability by each network alone",
        "scale": "0.0 to 1.0: 8-bit greys divided by 255",
        **{f"threshold_{name}": repr(value) for name, value in thresholds.items()},
        "threshold": repr(thresholds["balanced"]),
        "version": sha256,
        "commit": read_commit() or "unknown",
    }


def write_onnx(model: Any, path: Path, metadata: dict[str, str], packed: NDArray[np.uint8]) -> float:
    """Writes a ``keras.Model`` with one input, and metadata, as ONNX.

    Args:
        model: As from ``tasks.networks.classifier.join_members``.
        path: The file.
        metadata: As from ``describe_onnx``.
        packed: Images to compare answers on, uint8 ``(n, 224, 224)``, at least one.

    Returns:
        The largest difference of a probability.

    Raises:
        RunError: If it cannot be written, or the difference is beyond ``MAX_DIFFERENCE``; no file is left.
    """
    import onnx
    import onnxruntime
    import tensorflow as tf

    from tasks.networks.classifier import answer_pixels

    pixels = to_float(packed)
    tf.config.experimental.enable_tensor_float_32_execution(False)  # on a GPU that keeps three digits only
    expected = answer_pixels(model, [pixels])
    model(pixels[:1])  # Keras exports only what was called
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the converter, about names of NumPy
            model.export(path, format="onnx", verbose=False)
        proto = onnx.load(path)
        onnx.helper.set_model_props(proto, metadata)
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "n"
        onnx.save(proto, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # all of them raise many kinds for what ONNX does not know
        path.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[-160:] or type(error).__name__
        raise RunError(f"export: the network cannot be written as ONNX ({reason}); leave export out") from None
    names = ("probability", "bacteria", "members")
    found = session.run(names, {"pixels": pixels})
    difference = max(
        float(np.abs(one.reshape(len(packed), -1) - getattr(expected, name).reshape(len(packed), -1)).max())
        for name, one in zip(names, found, strict=True)
    )
    if not difference <= MAX_DIFFERENCE:
        path.unlink()
        raise RunError(f"{ONNX} answers otherwise than model.keras, by up to {difference:.2g}: leave out export")
    return difference
