"""Augmentation of the field: layers that make the contour of the lungs, or what is outside, worthless to a network.

See ``tasks.networks.field``. In training alone; images and masks ``(n, side, side, 1)``, 0.0 to 1.0.
"""

from typing import Any

from tasks.networks.augmentation import Augmentation
from tasks.networks.field import NARROW_PX, WIDE_PX, mean_grey, widen
from tasks.networks.keras_backend import keras

ops = keras.ops
FOREIGN = 0.1
"""Share of training images that get the mask of another child."""


@keras.saving.register_keras_serializable("x_ray")
class VaryMasks(Augmentation):
    """Widens masks by a random width, and gives some images another child's: contour and size shall tell nothing."""

    def change(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        foreign = ops.cast(self.draw(x, 0.0, 1.0) < FOREIGN, x.dtype)
        x = foreign * ops.roll(x, 1, axis=0) + (1.0 - foreign) * x
        return widen(x, self.draw(x, NARROW_PX, WIDE_PX))


@keras.saving.register_keras_serializable("x_ray")
class VaryOutside(Augmentation):
    """Images and masks to images of which a third keep what is outside of the mask, a third get that of another image,
    and a third a constant grey."""

    def call(self, x: Any, training: bool = False) -> Any:
        """Applies the layer to a pair of images and masks; outside of training it changes nothing."""
        return self.change(x) if training else x[0]

    def change(self, x: Any) -> Any:
        """Changes the outside of a batch of images."""
        images, masks = x
        emptied = images * (1.0 - masks) + mean_grey(images, 1.0 - masks) * masks  # or its lungs would come along
        choice = self.draw(images, 0.0, 3.0)
        other = ops.cast(choice >= 2.0, images.dtype) * self.draw(images, 0.0, 1.0)
        other = other + ops.cast((choice >= 1.0) & (choice < 2.0), images.dtype) * ops.roll(emptied, 1, axis=0)
        outside = ops.where(choice < 1.0, images, other)
        return images * masks + outside * (1.0 - masks)
