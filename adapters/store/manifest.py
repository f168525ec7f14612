"""What is known about a forget adapter, without a word of what it forgets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from adapters.atomic_files import read_json
from adapters.digests import MARK
from adapters.errors import StoreCorrupt, UserError

SCHEMA = 1
SLUG = re.compile(r"r\d{4,9}_[0-9a-f]{8}")
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/+-]{0,63}")
LABEL = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,80}")
WORD = re.compile(r"[^\s\x00-\x1f\x7f\ud800-\udfff]{0,120}")
LINE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{0,160}")
HEX64 = re.compile(r"[0-9a-f]{64}")
CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
POLICIES = ("independent", "on-stack", "consolidate", "imported", "derived")


@dataclass(frozen=True)
class ForgetManifest:
    """The record of one forget adapter: schema-versioned JSON, checked on every read.

    A caller that publishes gives `request_id` and, as far as known: `label` (opaque by default),
    `policy`, `data`, `base`, `parents`, `parent_scales`, `supersedes`, `objective`, `lora`,
    `train`, `env`. `AdapterStore.publish` fills in `slug`, `created`, `parent_sha256`, `files` and
    `norms`.

    - data: `{"forget": {"n": 20, "digest": digest_rows(...), "kind": "tofu:author", "key_id":
      key_id(...), "marks": [mark(...), ...]}, ...}`
    - base: `{"name": as the user gave it, "revision": None, "fingerprint":
      BaseFingerprint.to_json(), "view": base_view(model)}`
    - parents: slugs in the order of the stack; parent_scales: factor per slug where it is not 1
    - objective: `{"name": "simnpo", "beta": 2.5, ...}`; lora: `{"r": 8, "alpha": 16, ...}`
    - origin: where an adapter comes from that was not trained here (import, sum of others)
    - train, env: numbers, flags and short words (`env["versions"]`, `env["commit"]`, `env["seed"]`)

    Free text does not fit: strings in data, objective, lora and train are single words, so that no
    prompt or answer gets here by accident. All problems are reported at once.
    """

    request_id: str
    label: str = ""
    policy: str = "independent"
    data: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    parent_scales: dict[str, float] = field(default_factory=dict)
    supersedes: tuple[str, ...] = ()
    objective: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    slug: str = ""
    created: str = ""
    parent_sha256: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name in ("parents", "supersedes"):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], what: str = "The manifest") -> ForgetManifest:
        """The manifest in `value`; StoreCorrupt names every problem."""
        known = {f.name for f in fields(cls)}
        missing = {"request_id", "schema", "slug", "files"} - set(value)
        problems = [f"{name} is missing" for name in sorted(missing)]
        problems += [f"{_brief(name)} is unknown" for name in sorted(set(value) - known)]
        if not problems:
            manifest = cls(**dict(value))
            problems = manifest.problems(stored=True)
            if not problems:
                return manifest
        raise StoreCorrupt(
            f"{what} is not valid: {'; '.join(problems[:8])}.", "Restore it from a copy."
        )

    @classmethod
    def read(cls, path: Path) -> ForgetManifest:
        """The manifest in the file at `path`."""
        what = f"{path.parent.name}/{path.name}"
        return cls.from_json(read_json(path, what), what)

    def checked(self) -> ForgetManifest:
        """This manifest with its label filled in, or UserError with every problem in it."""
        manifest = replace(self, label=self.label or f"request-{self.request_id}")
        problems = manifest.problems()
        if problems:
            raise UserError(
                f"The manifest is not valid: {'; '.join(problems)}.",
                "Correct these fields; free text has no place in the store.",
            )
        return manifest

    def problems(self, *, stored: bool = False) -> list[str]:
        """Everything that is wrong with the fields, as sentences without a full stop."""
        found: list[str] = []
        if type(self.schema) is not int or self.schema != SCHEMA:
            found.append(f"schema {self.schema!r} is not {SCHEMA}, the one this release reads")
        _text(found, "request_id", self.request_id, REQUEST_ID)
        _text(found, "label", self.label, LABEL)
        if self.policy not in POLICIES:
            found.append(f"policy is not one of {', '.join(POLICIES)}")
        for name in ("parents", "supersedes"):
            _slugs(found, name, getattr(self, name))
        _data(found, self.data)
        _base(found, self.base)
        for name in ("objective", "lora", "train", "origin"):
            _values(found, name, getattr(self, name), WORD)
        _values(found, "env", self.env, LINE)
        _numbers(found, "norms", self.norms)
        _numbers(found, "parent_scales", self.parent_scales)
        if not found and set(self.parent_scales) - set(self.parents):
            found.append("parent_scales names an adapter that is not a parent")
        if stored and not found:
            _stored(found, self)
        return found


def _text(found: list[str], name: str, value: Any, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        found.append(f"{name} {_brief(value)} is not a short name")


def _slugs(found: list[str], name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(
        isinstance(v, str) and SLUG.fullmatch(v) for v in value
    ):
        found.append(f"{name} {_brief(value)} is not a tuple of adapter slugs")
    elif len(set(value)) != len(value):
        found.append(f"{name} names an adapter twice")


def _data(found: list[str], value: Any) -> None:
    if not isinstance(value, dict):
        found.append("data is not an object")
        return
    for part, entry in value.items():
        if not isinstance(part, str) or not KIND.fullmatch(part) or not isinstance(entry, dict):
            found.append(f"data {_brief(part)} is not an object with n, digest and kind")
            continue
        extra = set(entry) - {"n", "digest", "kind", "key_id", "revision", "marks"}
        if extra:
            found.append(f"data.{part} has {_brief(sorted(map(str, extra))[0])}")
        if type(entry.get("n")) is not int or entry["n"] < 0:
            found.append(f"data.{part}.n is not a count")
        if not _matches(entry.get("digest"), HEX64):
            found.append(f"data.{part}.digest is not 64 hex digits")
        marks = entry.get("marks", ())
        if not isinstance(marks, (list, tuple)) or not all(_matches(m, MARK) for m in marks):
            found.append(f"data.{part}.marks is not a list of keyed digests")
        for name in ("kind", "key_id", "revision"):
            if name in entry and entry[name] is not None and not _matches(entry[name], KIND):
                found.append(f"data.{part}.{name} {_brief(entry[name])} is not one word")


def _base(found: list[str], value: Any) -> None:
    if not isinstance(value, dict):
        found.append("base is not an object")
        return
    for name in set(value) - {"name", "revision", "fingerprint", "view"}:
        found.append(f"base.{_brief(name)} is unknown")
    for name in ("name", "revision"):
        if value.get(name) is not None and not _matches(value[name], LINE):
            found.append(f"base.{name} is not a name")
    _values(found, "base.view", value.get("view", {}), WORD)
    fingerprint = value.get("fingerprint")
    if fingerprint is not None:
        from adapters.base.fingerprint import BaseFingerprint

        try:
            BaseFingerprint.from_json(fingerprint if isinstance(fingerprint, dict) else {})
        except StoreCorrupt as error:
            found.append(f"base.fingerprint: {error.problem.rstrip('.')}")


def _values(
    found: list[str], name: str, value: Any, words: re.Pattern[str], depth: int = 0
) -> None:
    """Numbers, flags, null and short strings, nested four deep at most."""
    if depth == 0 and not isinstance(value, dict):
        found.append(f"{name} is not an object")
    elif isinstance(value, dict) and depth < 4:
        for key, inner in value.items():
            if not isinstance(key, str) or not _matches(key, WORD):
                found.append(f"{name} has the key {_brief(key)}")
            else:
                _values(found, f"{name}.{key[:40]}", inner, words, depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 4:
        for inner in value:
            _values(found, name, inner, words, depth + 1)
    elif isinstance(value, str):
        if not words.fullmatch(value):
            found.append(f"{name} {_brief(value)} is not a short word")
    elif isinstance(value, float):
        if value != value or abs(value) == float("inf"):
            found.append(f"{name} is not finite")
    elif value is not None and not isinstance(value, (bool, int)):
        found.append(f"{name} is a {type(value).__name__}")


def _numbers(found: list[str], name: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(
        isinstance(k, str)
        and _matches(k, WORD)
        and type(v) in (int, float)
        and v == v
        and abs(v) < 1e30
        for k, v in value.items()
    ):
        found.append(f"{name} is not an object of numbers")


def _stored(found: list[str], manifest: ForgetManifest) -> None:
    """Fields that only a published manifest has."""
    if not _matches(manifest.slug, SLUG):
        found.append(f"slug {_brief(manifest.slug)} is malformed")
    if not _matches(manifest.created, CREATED):
        found.append(f"created {_brief(manifest.created)} is not a UTC time")
    hashes = manifest.parent_sha256
    if not isinstance(hashes, dict) or not all(_matches(h, HEX64) for h in hashes.values()):
        found.append("parent_sha256 is malformed")
    elif set(hashes) != set(manifest.parents):
        found.append("parent_sha256 does not cover the parents")
    files = manifest.files
    if not isinstance(files, dict) or set(files) != {
        "adapter_config.json",
        "adapter_model.safetensors",
    }:
        found.append("files does not list the configuration and the weights")
        return
    for name, entry in files.items():
        if (
            not isinstance(entry, dict)
            or set(entry) != {"sha256", "size"}
            or not _matches(entry["sha256"], HEX64)
            or type(entry["size"]) is not int
        ):
            found.append(f"files.{name} is malformed")


def _matches(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _brief(value: Any) -> str:
    # A wrong value may be forget text: show its start only, enough to find the field.
    text = repr(value)
    return text if len(text) <= 24 else text[:20] + "...'"
