"""LIME (Ribeiro et al. 2016): perturbed copies of an X-ray are drawn and asked about, and pieces get their weights.

lime's image explainer, with its loop over the copies made one array operation: the random draws are the same as lime's,
kernel and regression are its own code. A module of its own because lime brings scikit-learn and scikit-image along,
seconds that a flow's start need not wait.
"""

from dataclasses import dataclass

import numpy as np
from lime.lime_image import LimeImageExplainer
from numpy.typing import NDArray
from skimage.segmentation import slic

from tasks.explaining.subjects import Network


@dataclass(frozen=True)
class PieceWeights:
    """What lime says of the pieces of one image.

    Attributes:
        weights: float64 ``(n_pieces,)``, positive where a piece raises P(label = 1); to six decimals, so that the
            rounding of a constant network's answer is no map.
        probability: What the network says of the whole image.
        r2: Weighted R² of the local fit; NaN where no piece has a weight.
        intercept: Of the local fit.
        local_probability: What the local fit says of the whole image.
    """

    weights: NDArray[np.float64]
    probability: float
    r2: float
    intercept: float
    local_probability: float


class CutImage:
    """An X-ray cut into pieces, and copies of it with some hidden, each under its own mean grey, as lime hides them.

    Args:
        grey: float32 ``(side, side)``, 0.0 to 1.0.
        pieces: int ``(side, side)``, numbered from 0.
    """

    def __init__(self, grey: NDArray[np.float32], pieces: NDArray[np.intp]) -> None:
        self.grey, self.pieces = grey, pieces
        means = np.bincount(pieces.ravel(), weights=grey.ravel()) / np.bincount(pieces.ravel())
        self.n_pieces, self._hidden = len(means), means.astype(np.float32)[pieces]

    def show(self, shown: NDArray[np.bool_ | np.intp]) -> NDArray[np.float32]:
        """Copies with the pieces shown that are 1 in ``shown``, ``(n, n_pieces)``: float32 ``(n, side, side)``."""
        # No matrix product: its threads spin on for a while, and take the processor from the network's.
        return np.where(shown.astype(bool)[:, self.pieces], self.grey, self._hidden)


class ArrayExplainer(LimeImageExplainer):
    """lime's explainer with the perturbed copies made by one array operation; the random draws are the same."""

    def data_labels(
        self,
        image: NDArray[np.float32],
        fudged_image: NDArray[np.float32],
        segments: NDArray[np.intp],
        classifier_fn: Network,
        num_samples: int,
        batch_size: int = 10,
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """As ``LimeImageExplainer.data_labels``, for grey images: see there."""
        cut = CutImage(image[..., 0], segments)
        data = self.random_state.randint(0, 2, num_samples * cut.n_pieces).reshape(num_samples, cut.n_pieces)
        data[0, :] = 1
        starts = range(0, num_samples, batch_size)
        answers = [classifier_fn(cut.show(data[start : start + batch_size])) for start in starts]
        probability = np.concatenate(answers)
        self.own_probability = float(probability[0])
        return data, np.stack([1 - probability, probability], axis=1)


def weigh_pieces(cut: CutImage, network: Network, *, n_samples: int, batch_size: int, seed: int) -> PieceWeights:
    """LIME weights of the pieces of an X-ray.

    Args:
        cut: The X-ray.
        network: The network that is asked.
        n_samples: Perturbed copies; the first is the image itself.
        batch_size: Copies in one call of the network.
        seed: Seed of the perturbations.
    """
    explainer = ArrayExplainer(random_state=seed)
    explanation = explainer.explain_instance(
        np.repeat(cut.grey[..., None], 3, axis=2),
        network,
        labels=(1,),
        hide_color=0,  # the cut image makes its own; lime's would be made in vain
        top_labels=None,
        num_samples=n_samples,
        batch_size=batch_size,
        segmentation_fn=lambda _: cut.pieces,
        random_seed=seed,
    )
    weights = np.zeros(cut.n_pieces)
    for piece, weight in explanation.local_exp[1]:
        weights[piece] = round(float(weight), 6)
    return PieceWeights(
        weights,
        explainer.own_probability,
        float(explanation.score) if weights.any() else float("nan"),
        float(explanation.intercept[1]),
        float(np.ravel(explanation.local_pred)[0]),
    )


def cut_image(grey: NDArray[np.float32], n_segments: int) -> CutImage:
    """An X-ray, float32 ``(side, side)``, cut into SLIC superpixels, about ``n_segments`` of them."""
    pieces = slic(grey, n_segments=n_segments, compactness=0.15, sigma=1.0, start_label=0, channel_axis=None)
    return CutImage(grey, np.unique(pieces, return_inverse=True)[1].reshape(pieces.shape))
