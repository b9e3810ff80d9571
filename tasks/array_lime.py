"""lime's image explainer with its loop over perturbed copies made one array operation.

A module of its own because lime brings scikit-learn and scikit-image along, seconds that a flow's start need not wait.
"""

from collections.abc import Callable

import numpy as np
from lime.lime_image import LimeImageExplainer
from numpy.typing import NDArray
from skimage.segmentation import slic

Network = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""Grey images float32 (n, side, side), 0.0 to 1.0, to P(label = 1), float64 (n,)."""


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
        names, places = np.unique(segments, return_inverse=True)
        places = places.reshape(segments.shape)
        data = self.random_state.randint(0, 2, num_samples * len(names)).reshape(num_samples, len(names))
        data[0, :] = 1
        grey, hidden = image[..., 0].astype(np.float32), fudged_image[..., 0].astype(np.float32)
        answers = []
        for start in range(0, num_samples, batch_size):
            shown = data[start : start + batch_size].astype(bool)[:, places]
            answers.append(classifier_fn(np.where(shown, grey, hidden)))
        probability = np.concatenate(answers)
        return data, np.stack([1 - probability, probability], axis=1)


def cut_pieces(grey: NDArray[np.float32], n_segments: int) -> NDArray[np.intp]:
    """SLIC superpixels of an X-ray ``(side, side)``, numbered from 0; about ``n_segments`` of them."""
    pieces = slic(grey, n_segments=n_segments, compactness=0.15, sigma=1.0, start_label=0, channel_axis=None)
    return np.unique(pieces, return_inverse=True)[1].reshape(pieces.shape)
