"""What makes two runs the same run. Results of different policies, models or sources are never mixed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from blake3 import blake3

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import canonical_json
from lookonce.moderation.policy import Policy
from protos.lookonce.v1 import language_pb2, vision_pb2

_CONTEXT = "lookonce 2026 language model fingerprint"


@dataclass(frozen=True)
class Models:
    """The two halves that judge."""

    vision: str  # encoder fingerprint
    language: str  # fingerprint of the language half
    max_pixels: int  # images are scaled down to this
    name: str = field(compare=False)  # for people

    @classmethod
    def of(
        cls, vision: vision_pb2.VisionDescription, language: language_pb2.LanguageDescription, policy: Policy
    ) -> Models:
        """From what the services say. Raises FINGERPRINT_MISMATCH when they don't belong together; INVALID_ARGUMENT for
        a policy that leaves an image no token."""
        if vision.fingerprint not in language.fingerprints:
            accepted = ", ".join(fingerprint[:12] for fingerprint in language.fingerprints)
            raise LookonceError(
                ErrorKind.FINGERPRINT_MISMATCH,
                f"the vision service has the encoder {vision.fingerprint[:12]}, the language service accepts "
                f"{accepted}: start both with the same checkpoint",
            )
        if policy.max_pixels is not None and policy.max_pixels < vision.least_pixels:
            raise invalid(f"policy: 'max_pixels' must be at least {vision.least_pixels}, got {policy.max_pixels}")
        most = min(policy.max_pixels or vision.max_pixels, vision.max_pixels)
        return cls(vision.fingerprint, language_fingerprint(language), most, language.model.name)


def language_fingerprint(language: language_pb2.LanguageDescription) -> str:
    """64 hexadecimal characters over checkpoint, compute dtype and quantisation of the language half."""
    model = language.model
    fields = {
        "checkpoint": model.checkpoint,
        "family": model.family,
        "dtype": model.dtype,
        "quantization": model.quantization or "none",
    }
    return str(blake3(canonical_json(fields), derive_key_context=_CONTEXT).hexdigest())


@dataclass(frozen=True)
class Identity:
    """Of a run."""

    source: str  # as described
    source_digest: str
    count: int | None
    policy_digest: str
    models: Models
    form: str  # of moderate.forms
    part_rows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Identity:
        return cls(**{**fields, "models": Models(**fields["models"])})

    def judgement_key(self) -> str:
        """What the scores of an image are bound to."""
        models = self.models
        return _canonical([self.policy_digest, models.vision, models.language, models.max_pixels])

    def run_key(self) -> str:
        """What rows and parts are bound to: all in which two runs can differ."""
        parts = [self.source, self.source_digest, self.count, self.form, self.part_rows]
        return _canonical([*parts, self.judgement_key()])

    def same_judgement(self, other: Identity) -> bool:
        """Whether an image has the same scores in both."""
        return self.judgement_key() == other.judgement_key()

    def differences(self, now: Identity) -> list[str]:
        """What differs between the run that was begun and the one wanted now, in words that name both."""
        found = []
        if self.source != now.source:
            found.append(f"the source was {self.source}, now it is {now.source}")
        elif (self.source_digest, self.count) != (now.source_digest, now.count):
            found.append(f"{now.source} has changed: {_listed(self)} then, {_listed(now)} now")
        if self.policy_digest != now.policy_digest:
            found.append(f"the policy was {self.policy_digest[:12]}, now it is {now.policy_digest[:12]}")
        if self.models.vision != now.models.vision:
            found.append(f"the encoder was {self.models.vision[:12]}, now it is {now.models.vision[:12]}")
        if self.models.language != now.models.language:
            then = f"{self.models.language[:12]} ({self.models.name})"
            found.append(f"the language model was {then}, now it is {now.models.language[:12]} ({now.models.name})")
        if self.models.max_pixels != now.models.max_pixels:
            then, wanted = f"{self.models.max_pixels:,}", f"{now.models.max_pixels:,}"
            found.append(f"images were scaled to at most {then} pixels, now {wanted}")
        if (self.form, self.part_rows) != (now.form, now.part_rows):
            then, wanted = f"{self.form} of {self.part_rows} rows", f"{now.form} of {now.part_rows} rows"
            found.append(f"parts were {then}, now they would be {wanted}")
        return found


def _canonical(value: Any) -> str:
    return canonical_json(value).decode("utf-8")


def _listed(identity: Identity) -> str:
    count = "an unknown number of" if identity.count is None else f"{identity.count:,}"
    return f"{count} entries ({identity.source_digest[:12]})"


@dataclass(frozen=True)
class Manifest:
    """Written beside the results, and into them: the run's identity, and the policy by which it judged."""

    identity: Identity
    policy: Policy
    options: dict[str, Any]  # how the source is read again

    def to_json(self) -> dict[str, Any]:
        return {
            "version": 1,
            **self.identity.to_json(),
            "policy": self.policy.model_dump(mode="json"),
            "options": self.options,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Manifest:
        """What `to_json` made. Raises CONFLICT for another version, ValueError for another policy than it names."""
        fields = dict(fields)
        if fields.pop("version", None) != 1:
            raise LookonceError(ErrorKind.CONFLICT, "the results were made by another version of lookonce")
        policy, options = Policy.model_validate(fields.pop("policy")), fields.pop("options")
        identity = Identity.from_json(fields)
        if policy.digest != identity.policy_digest:
            raise ValueError("the policy is not the one that the results were judged by")
        return cls(identity, policy, options)
