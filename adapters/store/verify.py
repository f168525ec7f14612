"""Is a stored adapter what its manifest says: hashes, configuration, tensors, values, base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapters.atomic_files import sha256_file
from adapters.base.fingerprint import BaseFingerprint, require_same_base
from adapters.errors import StoreCorrupt, UserError
from adapters.lora.format import CONFIG_NAME, check_finite, config_bytes, read_adapter
from adapters.store.manifest import ForgetManifest
from adapters.store.states import StoreState

MANIFEST_NAME = "forget_manifest.json"
EVALS_NAME = "evals"


@dataclass(frozen=True)
class VerifyResult:
    """What checking one adapter found; `problems` is empty when all is as recorded."""

    slug: str
    problems: tuple[str, ...]
    wrong_base: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_folder(
    folder: Path, state: StoreState, base: BaseFingerprint | None = None
) -> VerifyResult:
    """Check the adapter in `folder` of a store; every problem is named."""
    slug = folder.name
    try:
        manifest = ForgetManifest.read(folder / MANIFEST_NAME)
    except UserError as error:
        return VerifyResult(slug, (error.problem,))
    problems = [] if manifest.slug == slug else [f"its manifest is that of {manifest.slug}"]
    recorded = state.manifests.get(slug)
    if recorded and sha256_file(folder / MANIFEST_NAME) != recorded:
        problems.append(f"{MANIFEST_NAME} was changed since it was published")
    problems += _file_problems(folder, manifest)
    if not problems:
        problems += _content_problems(folder, manifest)
    problems += [
        f"its parent {parent} is {state.status.get(parent, 'not in this store')}"
        for parent in manifest.parents
        if state.status.get(parent) in (None, "purged", "quarantined")
    ]
    wrong_base = False
    if base is not None:
        try:
            require_same_base(manifest_base(manifest), base)
        except UserError as error:
            problems.append(error.problem)
            wrong_base = True
    return VerifyResult(slug, tuple(problems), wrong_base)


def manifest_base(manifest: ForgetManifest) -> BaseFingerprint:
    """The fingerprint of the base that the adapter was trained on."""
    value = manifest.base.get("fingerprint")
    if not isinstance(value, dict):
        raise UserError(
            f"The manifest of request {manifest.request_id} does not say which base it is for.",
            "Give base={'fingerprint': fingerprint_base(folder).to_json(), ...}.",
        )
    return BaseFingerprint.from_json(value)


def _file_problems(folder: Path, manifest: ForgetManifest) -> list[str]:
    problems = []
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name} was changed (its SHA-256 is another)")
    known = {*manifest.files, MANIFEST_NAME, EVALS_NAME}
    extra = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if extra:
        problems.append(f"{extra[0]} does not belong there")
    return problems


def _content_problems(folder: Path, manifest: ForgetManifest) -> list[str]:
    try:
        files = read_adapter(folder)
        check_finite(files)
    except UserError as error:
        return [error.problem]
    if (folder / CONFIG_NAME).read_bytes() != config_bytes(files.config):
        return [f"{CONFIG_NAME} is not in canonical form"]
    if manifest.slug.rsplit("_", 1)[-1] != manifest.files[files.weights.name]["sha256"][:8]:
        return ["its name does not carry the hash of its weights"]
    return []


def require_ok(result: VerifyResult) -> None:
    """Raise StoreCorrupt with the problems of a result, unless there are none."""
    if result.problems:
        raise StoreCorrupt(
            f"Adapter {result.slug} is not as recorded: {'; '.join(result.problems)}.",
            "Restore it from a copy or a bundle, or train it again.",
        )
