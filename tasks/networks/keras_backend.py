"""Keras, imported in one place, with the native log of its backend muted and no setting of the user's machine.

TensorFlow's C++ code logs a page about processors and missing GPUs to standard error before any logging setting takes
effect. File descriptor 2 is redirected while it starts; if the start fails, the log is printed.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from tasks.errors import SettingsError


@contextlib.contextmanager
def native_log_muted() -> Iterator[None]:
    """Keeps what native code writes to file descriptor 2 off the terminal, unless an exception leaves the block."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(terminal, kept.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


try:
    with native_log_muted():
        import keras

        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            tf.config.list_physical_devices("GPU")  # looks for a GPU now, while the log is muted
except (ValueError, AttributeError, TypeError, OSError) as error:
    reason = str(error).split("\n")[0][:200]
    raise SettingsError(
        f"keras.json: Keras does not start with the one in ~/.keras or KERAS_HOME ({reason}); correct or remove it"
    ) from None

# What ~/.keras/keras.json may say otherwise: the networks and their files are made for these.
keras.config.set_floatx("float32")
keras.config.set_epsilon(1e-7)
keras.config.set_image_data_format("channels_last")
keras.config.set_dtype_policy("float32")

__all__ = ["keras"]
