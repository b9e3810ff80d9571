"""The part of the report that shows single images with their LIME maps."""

from collections.abc import Sequence
from pathlib import Path

from tasks.files import read_json
from tasks.records import CLASS_NAMES, MODEL, TWIN, Facts
from tasks.reporting.inputs import SPLIT_NAMES
from tasks.settings import ExplanationSettings

PICTURES_MB = 12.0
"""Room for LIME pictures, base64 included; the page has to stay below 15 MB."""
WEAK = 0.01
"""A map whose strongest piece moves the probability by less than this says little; its tints are scaled to it."""
CARD_GROUPS = {
    (1, False): ("missed", "Missed pneumonia", "truly pneumonia, called normal"),
    (0, False): ("alarm", "False alarms", "truly normal, called pneumonia"),
    (1, True): ("found", "Pneumonia found", "truly pneumonia, called pneumonia"),
    (0, True): ("cleared", "Normal recognised", "truly normal, called normal"),
}
FILTERS = {
    "answer": ("Answer", {"right": "right", "wrong": "wrong"}),
    "class": ("Class", {name: name for name in CLASS_NAMES.values()}),
    "subtype": ("Subtype", {"bacteria": "bacteria", "virus": "virus", "unknown": "not known"}),
    "device": ("Device", {"yes": "seen", "no": "none seen", "unknown": "not known"}),
    "map": ("Map", {"stable": "stable", "unstable": "unstable", "unknown": "one seed"}),
}
"""Attribute of a card -> name and choices of its filter; only choices that occur are offered."""


COMPARED = {
    TWIN: ("Without screening", "the map of the unscreened twin", "this model"),
    MODEL: ("The run’s model", "the map of the run’s model", "this network"),
}
"""Of a network that is shown beside: title, what its map is called, and what the other one is called then."""


def describe_gallery(folder: Path, splits: Sequence[str], explanation: ExplanationSettings, explained: Facts) -> Facts:
    """LIME cards by right and wrong of each class; pictures as JPEG, as many as the page has room for.

    Args:
        folder: That holds ``explanations/``.
        splits: Whose images are shown.
        explanation: The settings they were made with.
        explained: How far the maps can be believed, as from ``tasks.explaining.explanations.sum_up``.
    """
    from tasks.reporting.figures import read_picture

    found = [read_json(path) for path in sorted((folder / "explanations").glob("*.json"))]
    found = [item for item in found if item["split"] in splits]
    found.sort(key=lambda item: -item["probability"])
    queues = {key: [item for item in found if (item["label"], item["right"]) == key] for key in CARD_GROUPS}
    # In turns, so that when the room ends no group is the one that lacks all its pictures.
    turns = sorted((turn, g, key) for g, (key, queue) in enumerate(queues.items()) for turn in range(len(queue)))
    cards: dict[tuple[int, bool], list[Facts]] = {key: [] for key in CARD_GROUPS}
    room = PICTURES_MB * 1e6
    for turn, _, key in turns:
        item = queues[key][turn]
        picture = read_picture(folder / "explanations" / f"{item['image_id']}.png")
        room -= len(picture or "")
        if room < 0:
            break
        cards[key].append(describe_card(item, picture))
    shown = [card for queue in cards.values() for card in queue]
    return {
        "groups": [
            {"key": name, "title": title, "says": says, "wrong": not key[1], "cards": cards[key]}
            for key, (name, title, says) in CARD_GROUPS.items()
        ],
        "filters": describe_filters(shown),
        "n": len(found),
        "n_shown": len(shown),
        "split": SPLIT_NAMES[found[0]["split"]] if found else None,
        "compared": next((COMPARED[name] for name in COMPARED if any(name in item for item in found)), None),
        "n_samples": explanation.n_samples,
        "weak": WEAK,
        "trust": describe_trust(explained),
    }


def describe_filters(cards: list[Facts]) -> list[Facts]:
    """A filter for each attribute in which the shown cards differ: ``{"key", "name", "choices": [(value, text)]}``."""
    filters = []
    for key, (name, choices) in FILTERS.items():
        present = {card["kinds"][key] for card in cards}
        offered = [(value, text) for value, text in choices.items() if value in present]
        if len(offered) > 1:
            filters.append({"key": key, "name": name, "choices": offered})
    return filters


def describe_card(item: Facts, picture: str | None) -> Facts:
    """What a card says about one explained image, and by what it can be found."""
    device = {True: "yes", False: "no"}.get(item["has_device"], "unknown")
    stability, faithful = item["stability"], item["faithfulness"]
    kinds = {
        "answer": "right" if item["right"] else "wrong",
        "class": CLASS_NAMES[int(item["label"])],
        "subtype": item["subtype"],
        "device": device,
        "map": {True: "stable", False: "unstable"}.get(stability["stable"], "unknown"),
    }
    strongest = max(item["weights"] or [0.0], key=abs)
    strength = "below 0.001" if abs(strongest) < 0.001 else f"{strongest:+.3f}".replace("-", "−")
    lines = [
        ("Truth", kinds["class"] + (f", {item['subtype']}" if item["subtype"] in ("bacteria", "virus") else "")),
        ("Probability", say_probability(item["probability"])),
        ("Device", FILTERS["device"][1][device]),
        ("Strongest piece", strength + (", weak" if abs(strongest) < WEAK else "")),
        ("R²", "not defined" if item["r2"] is None else f"{item['r2']:.2f}"),
        ("Between seeds", say_stability(stability)),
        ("Deletion", f"{faithful['deletion']:.2f}, at random {faithful['random']:.2f}"),
    ]
    beside = next((name for name in COMPARED if name in item), None)
    if beside:
        title, its_map, this = COMPARED[beside]
        called = CLASS_NAMES[int(item[beside]["decision"])]
        lines.insert(2, (title, f"{say_probability(item[beside]['probability'])}, {called}"))
    return {
        "image_id": item["image_id"],
        "picture": picture,
        "kinds": kinds,
        "decision": CLASS_NAMES[int(item["decision"])],
        "lines": lines,
        "says": (
            f"Image {item['image_id']}: truly {lines[0][1]}, called {CLASS_NAMES[int(item['decision'])]} at "
            f"probability {say_probability(item['probability'])}. From left to right: the X-ray, "
            + (f"{its_map}, the map of {this}." if beside else "its LIME map.")
        ),
    }


def say_stability(stability: Facts) -> str:
    """How alike the maps of several seeds are, in a few words."""
    if stability["n_seeds"] < 2:
        return "one seed only"
    if stability["rank_correlation"] is None:
        return "not defined"
    return f"{stability['rank_correlation']:.2f}" + ("" if stability["stable"] else ", unstable")


def describe_trust(facts: Facts) -> Facts:
    """How far the maps of a run can be believed, as sentences, from the facts of the explain stage."""
    trust: Facts = {"stability": None, "faithfulness": None}
    n = facts["n_images"]
    if n_repeated := facts["n_repeated"]:
        trust["stability"] = (
            f"{n_repeated} of the images {'was' if n_repeated == 1 else 'were'} explained with {facts['n_seeds']} "
            "seeds each. The median rank correlation between two maps of an image is "
            f"{facts['rank_correlation']:.2f}, and they share {facts['top5_overlap']:.0%} of their five strongest "
            f"pieces; {facts['n_unstable']} of these maps are unstable."
        )
    if n:
        trust["faithfulness"] = (
            "Hiding pieces in the order of the map makes the probability of the answer fall sooner than hiding them at "
            f"random on {facts['n_deletion_better']} of {n} images (median area {facts['deletion']:.2f} against "
            f"{facts['random']:.2f}). Showing them in that order makes it rise sooner on {facts['n_insertion_better']} "
            f"(median area {facts['insertion']:.2f})."
        )
    return trust


def say_probability(value: float) -> str:
    """Three decimals; what would round to 0 or 1 is shown as below or above the last number that is not."""
    return "below 0.001" if value < 0.001 else "above 0.999" if value > 0.999 else f"{value:.3f}"
