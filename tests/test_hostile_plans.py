"""Plans that were edited badly, by hand or as JSON, are refused with the field, the rule and the value."""

from __future__ import annotations

import json
import re

import pytest

import lesionsynth as ls
from tests.plans import IDENTITY, blob, plan
from tests.test_hostile import check

# --- plans ---


BLOBS = {
    "negative axis": ({"semi_axes": (1.0, -1.0, 1.0)}, ["semi_axes", "> 0", r"-1\.0"]),
    "infinite axis": ({"semi_axes": (1.0, float("inf"), 1.0)}, ["semi_axes", "inf"]),
    "two axes": ({"semi_axes": (1.0, 1.0)}, ["semi_axes", "3"]),
    "not a unit quaternion": ({"rotation": (1.0, 1.0, 0.0, 0.0)}, ["rotation", "unit", r"1\.4"]),
    "quaternion of three": ({"rotation": IDENTITY[:3]}, ["rotation", "4"]),
    "quaternion NaN": ({"rotation": (float("nan"), 0.0, 0.0, 0.0)}, ["rotation", "nan"]),
    "position 1": ({"position": 1.0}, ["position", r"\[0, 1\)", r"1\.0"]),
    "position NaN": ({"position": float("nan")}, ["position", "nan"]),
    "centre negative": ({"center": (-1, 2, 3)}, ["center", "-1"]),
    "centre between voxels": ({"center": (1.5, 2, 3)}, ["center", r"1\.5|float"]),
    "amplitude negative": ({"warp_amplitude": -0.1}, ["warp_amplitude", r"-0\.1"]),
    "amplitude infinite": ({"warp_amplitude": float("inf")}, ["warp_amplitude", "inf"]),
    "correlation zero": ({"warp_correlation": 0.0}, ["warp_correlation", r"0\.0"]),
    "sigma_a NaN": ({"sigma_a": float("nan")}, ["sigma_a", "nan"]),
    "sigma_b zero": ({"sigma_b": 0.0}, ["sigma_b", r"0\.0"]),
    "a reversed": ({"a_low": 0.3, "a_high": 0.1}, ["a_low", r"0\.3", r"0\.1"]),
    "a above 1": ({"a_high": 1.2}, ["a_high", r"1\.2"]),
    "mu0 negative": ({"mu0": -0.2}, ["mu0", r"-0\.2"]),
    "mu0 infinite": ({"mu0": float("inf")}, ["mu0", "inf"]),
    "component negative": ({"component": -1}, ["component", "-1"]),
    "component too large": ({"component": 2**32 - 1}, ["component", str(2**32 - 1)]),
    "a none": ({"a_low": None}, ["a_low"]),
    "sigma_a text": ({"sigma_a": "2"}, ["sigma_a", "number", "str"]),
    "axis text": ({"semi_axes": ("1", 1.0, 1.0)}, ["semi_axes"]),
    "position none": ({"position": None}, ["position"]),
}


@pytest.mark.parametrize("name", BLOBS)
def test_blob(name) -> None:
    """Made by hand and read from JSON."""
    change, words = BLOBS[name]
    check((TypeError, ValueError), words, lambda: blob(**change))
    data = json.loads(plan(blob()).to_json())
    data["blobs"][0].update(change)
    corrupt(data, words)


def corrupt(data: dict[str, object], words: list[str]) -> None:
    """Fail unless the plan is refused; NaN and Infinity are no JSON, and no field is known yet."""
    text = json.dumps(data)
    unnamed = re.search("NaN|Infinity", text)
    check(
        ValueError, ["finite", unnamed.group()] if unnamed else words, lambda: ls.LesionPlan.from_json(text)
    )


PLANS = {
    "version": (lambda d: d.update(version=99), ["version", "99"]),
    "no version": (lambda d: d.pop("version"), ["version"]),
    "no seed": (lambda d: d.pop("seed"), ["seed"]),
    "no blobs": (lambda d: d.pop("blobs"), ["blobs"]),
    "no sigma_a": (lambda d: d["blobs"][0].pop("sigma_a"), ["sigma_a"]),
    "unknown field": (lambda d: d.update(colour="red"), ["colour"]),
    "unknown field of a blob": (lambda d: d["blobs"][0].update(colour="red"), ["colour"]),
    "seed too large": (lambda d: d.update(seed=2**32), ["seed", str(2**32)]),
    "seed a fraction": (lambda d: d.update(seed=0.5), ["seed", "integer", "float"]),
    "index text": (lambda d: d.update(index="1"), ["index", "integer", "str"]),
    "lung_fraction NaN": (lambda d: d.update(lung_fraction=float("nan")), ["lung_fraction", "nan"]),
    "connectivity": (lambda d: d.update(connectivity=4), ["connectivity", "4"]),
    "tau NaN": (lambda d: d.update(tau=float("nan")), ["tau", "nan"]),
    "tau text": (lambda d: d.update(tau="x"), ["tau", "number", "str"]),
    "mean_threshold 0": (lambda d: d.update(mean_threshold=0), ["mean_threshold", "0"]),
    "scale zero": (lambda d: d.update(scale=[0, 1, 1]), ["scale|spacing", "0"]),
    "scale none": (lambda d: d.update(scale=None), ["scale", "None"]),
    "shape of two": (lambda d: d.update(shape=[4, 4]), ["shape", "4"]),
    "shape text": (lambda d: d.update(shape="abc"), ["shape"]),
    "blobs a number": (lambda d: d.update(blobs=3), ["blobs", "list", "int"]),
    "blob a number": (lambda d: d.update(blobs=[3]), ["blob", "object", "int"]),
}


@pytest.mark.parametrize("name", PLANS)
def test_corrupted_plan(name) -> None:
    """A plan edited by hand, with a slip."""
    change, words = PLANS[name]
    data = json.loads(plan(blob()).to_json())
    change(data)
    corrupt(data, words)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"plan"', "{}"])
def test_not_a_plan(text) -> None:
    """Text that is no JSON, or JSON that is no plan."""
    check(ValueError, ["plan|JSON|version"], lambda: ls.LesionPlan.from_json(text))


def test_json_that_is_no_text() -> None:
    """Bytes that are not text, a dictionary, nothing."""
    for value in (None, {}, 3):
        check((TypeError, ValueError), ["text|plan|JSON"], lambda value=value: ls.LesionPlan.from_json(value))
