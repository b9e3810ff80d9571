"""LIME with its copies made by one array operation and large batches, against the stock library on the same X-ray."""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from lime import lime_image
from numpy.typing import NDArray

from tasks.drawings.chests import draw_chest, finish_film, imagine_child
from tasks.explaining.lime_sampling import CutImage, cut_image, weigh_pieces
from tasks.settings import TrainingSettings

N_SAMPLES = 1_000
N_SEGMENTS = 64
BATCH_SIZE = 256
STOCK_BATCH_SIZE = 10
ROUNDS = 5
DEFAULT_ROUNDS = 3  # quickshift and a hundred calls of predict take many seconds
OVERHEAD_SIDE_PX, SIDE_PX = 224, 128
SEED = 7

lime_image.tqdm = partial(lime_image.tqdm, disable=True)

Floats = NDArray[np.float32]
Answer = NDArray[np.float64]
Work = Callable[[], object]


def main() -> None:
    """Prints ``{"bench": "lime", "ratio_default", "ratio_batched", "ratio_overhead", …}``: medians over rounds."""
    large, small = draw_x_ray(OVERHEAD_SIDE_PX), draw_x_ray(SIDE_PX)
    cut = cut_image(large, N_SEGMENTS)
    ask, predict, n_weights = build_network()
    for network, size in ((ask, BATCH_SIZE), (ask, N_SAMPLES % BATCH_SIZE), (predict, STOCK_BATCH_SIZE)):
        network(np.repeat(small[None], size, axis=0))  # compiled once for each size
    own_small = partial(explain, small, ask)
    overhead = time_in_turns(
        ROUNDS,
        partial(explain, large, answer_nothing, cut),
        partial(explain_stock, large, lambda rgb: in_columns(answer_nothing(rgb[..., 0])), cut),
    )
    batched = time_in_turns(
        ROUNDS,
        own_small,
        partial(explain_stock, small, lambda rgb: in_columns(ask(rgb[..., 0])), batch_size=BATCH_SIZE),
    )
    default = time_in_turns(
        DEFAULT_ROUNDS, own_small, partial(explain_stock_defaults, small, lambda rgb: in_columns(predict(rgb[..., 0])))
    )
    result: dict[str, object] = {"bench": "lime"}
    for name, (own, stock) in (("default", default), ("batched", batched), ("overhead", overhead)):
        result[f"ratio_{name}"] = round(stock / own, 2)
        result |= {f"{name}_own_s": round(own, 3), f"{name}_stock_s": round(stock, 3)}
    result |= {
        "n_weights": n_weights,
        "n_samples": N_SAMPLES,
        "n_pieces": cut_image(small, N_SEGMENTS).n_pieces,
    }
    result |= {"n_pieces_overhead": cut.n_pieces, "rounds": ROUNDS, "rounds_default": DEFAULT_ROUNDS}
    print(json.dumps(result), flush=True)


def draw_x_ray(side_px: int) -> Floats:
    """A child with pneumonia as the embedded sample draws it, float32 ``(side_px, side_px)``."""
    rng = np.random.default_rng(SEED)
    return finish_film(draw_chest(imagine_child(rng), "bacteria", 0.7, (side_px, side_px), rng), rng)


def build_network() -> tuple[Callable[[Floats], Answer], Callable[[Floats], Answer], int]:
    """The default network with first weights: by its compiled callable, by ``predict``; and the number of weights."""
    from tasks.networks.classifier import build_member
    from tasks.networks.keras_backend import keras

    member = build_member(TrainingSettings(side_px=SIDE_PX), SEED)
    model = keras.Model(member.input, keras.ops.sigmoid(member.output[:, 0]))

    def ask(grey: Floats) -> Answer:
        return np.asarray(model.predict_on_batch(grey[..., None]), np.float64)

    def predict(grey: Floats) -> Answer:
        return np.asarray(model.predict(grey[..., None], verbose=0), np.float64)

    return ask, predict, int(member.count_params())


def answer_nothing(grey: Floats) -> Answer:
    """A network that costs nothing: what is left is the price of the explainer."""
    return np.full(len(grey), 0.5)


def in_columns(probability: Answer) -> Answer:
    """As lime wants it: a column per class."""
    return np.stack([1 - probability, probability], axis=1)


def explain(grey: Floats, network: Callable[[Floats], Answer], cut: CutImage | None = None) -> object:
    """As the product explains, cutting included where it is not done."""
    return weigh_pieces(
        cut or cut_image(grey, N_SEGMENTS), network, n_samples=N_SAMPLES, batch_size=BATCH_SIZE, seed=SEED
    )


def explain_stock(
    grey: Floats,
    network: Callable[[Any], Answer],
    cut: CutImage | None = None,
    batch_size: int = STOCK_BATCH_SIZE,
) -> object:
    """The stock library on the same pieces; its own small batches, where nothing else is asked for, cost it least."""
    return lime_image.LimeImageExplainer(random_state=SEED).explain_instance(
        np.repeat(grey[..., None], 3, axis=2),
        network,
        labels=(1,),
        top_labels=None,
        num_samples=N_SAMPLES,
        batch_size=batch_size,
        segmentation_fn=lambda _: (cut or cut_image(grey, N_SEGMENTS)).pieces,
        random_seed=SEED,
    )


def explain_stock_defaults(grey: Floats, network: Callable[[Any], Answer]) -> object:
    """The stock library as its own examples use it: quickshift, batches of 10, both classes."""
    explainer = lime_image.LimeImageExplainer(random_state=SEED)
    return explainer.explain_instance(np.repeat(grey[..., None], 3, axis=2), network, num_samples=N_SAMPLES)


def time_in_turns(rounds: int, own: Work, stock: Work) -> tuple[float, float]:
    """Median seconds of both, which take turns."""
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds):
        start = time.perf_counter()
        own()
        middle = time.perf_counter()
        stock()
        seconds.append((middle - start, time.perf_counter() - middle))
    own_s, stock_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    return own_s, stock_s


if __name__ == "__main__":
    main()
