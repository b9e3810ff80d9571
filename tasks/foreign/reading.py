"""How X-rays are put to a network of other people, and what its answer means: guessed from its file, or asked for.

What the file leaves open in only one way is guessed; anything else is asked for, by the name of its flag.
"""

from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.errors import SettingsError
from tasks.records import Facts

Channels = Literal[1, 3]
Layout = Literal["first", "last"]
Scale = Literal["unit", "bytes", "signed", "imagenet"]
Needs = Literal["none", "sigmoid", "softmax"]
CHOICES: dict[str, dict[str, str]] = {
    "layout": {"first": "before height and width", "last": "after height and width"},
    "scale": {
        "unit": "0 (black) to 1 (white)",
        "bytes": "0 (black) to 255 (white)",
        "signed": "-1 (black) to 1 (white)",
        "imagenet": "0 to 1, less the mean of ImageNet, over its deviation",
    },
    "needs": {
        "none": "nothing, it is one",
        "sigmoid": "a sigmoid, it is a logit",
        "softmax": "a softmax, all its numbers are logits",
    },
}
"""What the words of a reading mean, for people."""
ENDS: dict[str, Needs] = {"sigmoid": "none", "softmax": "none", "log_softmax": "softmax"}
"""Last activation -> what is still needed, whatever the number of outputs."""
DTYPES = ("float16", "float32", "float64", "uint8")
MOST_NUMBERS = 1_000


class ReadAs(BaseModel):
    """How the network is read, where its file does not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    side: int | None = Field(None, ge=8, le=2_048, description="Side of the images that it takes, in pixels.")
    channels: Channels | None = Field(None, description="Channels that it takes: 1, or 3 equal ones.")
    layout: Layout | None = Field(None, description="Whether channels come first, or last.")
    scale: Scale | None = Field(
        None,
        description="Greys that it takes: unit (0 to 1), bytes (0 to 255), signed (-1 to 1), or imagenet (0 to 1, less "
        "the mean of ImageNet, over its deviation).",
    )
    output: str | None = Field(None, min_length=1, description="Name of the output, where there are several.")
    pneumonia: str | None = Field(
        None,
        pattern=r"^([0-9]{1,3}|rest)$",
        description="Which number of the output stands for pneumonia, counted from 0; 'rest' where the only one stands "
        "for normal.",
    )
    needs: Needs | None = Field(
        None,
        description="What makes it a probability: none, sigmoid (it is a logit), or softmax (all numbers are logits).",
    )


class FileFacts(BaseModel):
    """What a file says of its network.

    Attributes:
        sha256: Of the file.
        shape: Of the input, with the batch; ``None`` where it is free.
        dtype: Of the input.
        white: Which grey its first layer takes for white, 1 or 255; ``None`` where the file does not tell.
        outputs: How many numbers for an image, by name of the output; 0 where the file does not tell.
        ends: The last activation, by name of the output, where the file tells; ``linear`` is none.
    """

    sha256: str
    shape: tuple[int | None, ...]
    dtype: str
    white: float | None = None
    outputs: dict[str, int]
    ends: dict[str, str] = {}


class Reading(ReadAs):
    """How a network is read, with nothing left open; ``guessed`` names what was taken from the file."""

    facts: FileFacts
    side: int
    channels: Channels
    layout: Layout
    scale: Scale
    output: str
    pneumonia: str
    needs: Needs
    guessed: tuple[str, ...]

    def describe(self) -> list[tuple[str, str, str]]:
        """All of it for people: what, how it is read, and who says so."""
        n, number = self.facts.outputs[self.output], self.pneumonia
        which = f"number {number} (from 0) of {n}" if n > 1 else "its only number"
        which = f"1 less {which}" if number == "rest" else which
        says = {
            "side": ("Side of an image", f"{self.side} px"),
            "channels": ("Channels", "1" if self.channels == 1 else "3, all equal"),
            "layout": ("Place of channels", CHOICES["layout"][self.layout]),
            "scale": ("Greys", CHOICES["scale"][self.scale]),
            "output": ("Output", self.output),
            "pneumonia": ("Pneumonia", which),
            "needs": ("To be a probability it needs", CHOICES["needs"][self.needs]),
        }
        return [(*said, "the file" if name in self.guessed else f"--read.{name}") for name, said in says.items()]


def read_as(facts: FileFacts, asked: ReadAs) -> Reading:
    """The one reading that a file and the flags leave.

    Raises:
        SettingsError: If they leave several, or none.
    """
    shape, found = facts.shape, Facts()
    if facts.dtype not in DTYPES or len(shape) != 4:
        size = ", ".join("any" if one is None else str(one) for one in shape)
        raise SettingsError(f"model: it takes {facts.dtype} ({size}); only images (n, side, side, channels) are given")
    at = {"first": shape[1], "last": shape[3]}
    found["layout"] = _settle(asked, "layout", at, sure=_only([name for name, n in at.items() if n in (1, 3)]))
    found["channels"] = _settle(asked, "channels", (1, 3), sure=at[found["layout"]])
    sides = {side for side in (shape[2:] if found["layout"] == "first" else shape[1:3]) if side is not None}
    if len(sides) > 1:
        raise SettingsError("model: the images that it takes are not square; only square ones are given")
    found["side"] = _settle(asked, "side", sure=_only(sides))
    scales = [scale for scale in CHOICES["scale"] if found["channels"] == 3 or scale != "imagenet"]
    sure = "bytes" if facts.dtype == "uint8" else None
    found["scale"] = _settle(
        asked, "scale", scales, sure=sure, guess={255.0: "bytes", 1.0: "unit"}.get(facts.white or 0.0)
    )
    found["output"] = _settle(asked, "output", facts.outputs, guess=_only(facts.outputs))
    n, end = facts.outputs[found["output"]], facts.ends.get(found["output"], "")
    if not 1 <= n <= MOST_NUMBERS:
        raise SettingsError(
            f"model: its output has {n or 'an unknown number of'} numbers for an image; classes are few"
        )
    numbers = ["0", "rest"] if n == 1 else [str(number) for number in range(n)]
    found["pneumonia"] = _settle(asked, "pneumonia", numbers, guess="0" if n == 1 else None)
    needs = "sigmoid" if (end, n) == ("linear", 1) else ENDS.get(end)
    found["needs"] = _settle(asked, "needs", CHOICES["needs"], guess=needs)
    return Reading(facts=facts, guessed=tuple(name for name in found if getattr(asked, name) is None), **found)


def _settle(asked: ReadAs, name: str, choices: Collection[Any] = (), *, sure: Any = None, guess: Any = None) -> Any:
    """What was asked for, or what the file says for sure, or lets guess."""
    value = next((one for one in (getattr(asked, name), sure, guess) if one is not None), None)
    listed = ", ".join(map(str, choices)) or "a number"
    if value is None:
        raise SettingsError(f"read.{name}: the file leaves it open; give --read.{name} ({listed})")
    if sure is not None and value != sure:
        raise SettingsError(f"read.{name}: is {value}, but the file has {sure}; leave --read.{name} out")
    if choices and value not in choices:
        raise SettingsError(f"read.{name}: {value} does not go with this file; only {listed}")
    return value


def _only(found: Collection[Any]) -> Any:
    return next(iter(found)) if len(found) == 1 else None
