"""Keras, imported in one place, with the native log of its backend muted.

TensorFlow's C++ code logs a page about processors and missing GPUs to standard error before any logging setting takes
effect. File descriptor 2 is redirected while it starts; if the start fails, the log is printed.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


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


with native_log_muted():
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.list_physical_devices("GPU")  # looks for a GPU now, while the log is muted

__all__ = ["keras"]
