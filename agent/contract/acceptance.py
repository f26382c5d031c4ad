"""What a device demands of a release before and after it serves: golden cases and limits, and the rules of shadow, canary and
watch.
"""

from __future__ import annotations

from typing import Literal

from agent.contract.codec import Document

MIN_LEASE_S = 60.0
"""A shorter lease would end between two looks on a network that works."""


class Close(Document, frozen=True, kw_only=True, tag_field="kind", tag="close"):
    """Every element is within `atol + rtol * |expected|` of the expected one."""

    atol: float = 0.0
    rtol: float = 0.0


class Top1(Document, frozen=True, kw_only=True, tag_field="kind", tag="top1"):
    """The expected array holds one class index per row; at least `min_agreement` of the rows have it as their largest
    output.
    """

    min_agreement: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.min_agreement <= 1.0:
            raise ValueError("min_agreement must be above 0 and at most 1")


class GoldenCase(Document, frozen=True, kw_only=True):
    """Inputs and what must come out. Both files are .npz without pickled objects, an array per tensor under its name; texts are
    arrays of NumPy's kinds S and U.
    """

    name: str
    inputs: str
    expected: str
    compare: dict[str, Close | Top1]
    signature: str = ""
    """Whose names these are, and which is run. Empty: the default one, and the tensors' own names are understood too."""

    def __post_init__(self) -> None:
        if not self.compare:
            raise ValueError(f"golden case {self.name!r} compares no output")


class WatchRules(Document, frozen=True, kw_only=True):
    """When the watch that follows activation commits, and what makes it roll back.

    It commits after `duration_s` once `min_requests` were answered (or `max_duration_s` passed in silence), unless those few
    failed: then it waits for enough to judge, and is rolled back when `max_duration_s` ends with most of them failed. It rolls
    back as soon as the share of failed requests exceeds the device's own baseline by `max_error_ratio_increase` over at least
    `min_requests_to_judge` requests, the p95 exceeds `max_p95_ratio` times the baseline's, or the serving process crashed more
    than `max_crashes` times.

    What ended well is committed once a report that says so reached the fleet's broker; `report_within_s` is how long that may
    take before a device that could report earlier rolls back (see Acceptance.offline_commit).
    """

    duration_s: float = 300.0
    max_duration_s: float = 3600.0
    min_requests: int = 0
    min_requests_to_judge: int = 20
    max_error_ratio_increase: float = 0.02
    max_p95_ratio: float = 5.0
    max_crashes: int = 0
    report_within_s: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.duration_s <= self.max_duration_s:
            raise ValueError("duration_s must be above 0 and at most max_duration_s")
        if self.report_within_s <= 0:
            raise ValueError("report_within_s must be above 0")
        if self.min_requests_to_judge < 1:
            raise ValueError("min_requests_to_judge must be at least 1")


class ShadowRules(Document, frozen=True, kw_only=True):
    """What is demanded of the release while it runs on copies of live requests beside the one that answers them.

    Its rules are judged once `min_samples` were tried, and all the time from then on. How much a new release may differ only
    its publisher knows, so agreement and flips are judged only where a rule is set.
    """

    required: bool = False
    """Before it may be installed. False: only in a rollout of mode shadow."""
    share: float = 0.1
    """Of the requests that were answered."""
    max_rate: float = 5.0
    """Copies per second at most."""
    min_samples: int = 50
    """Fewer are not judged by the rules below."""
    min_agreement: float = 0.0
    """The share of samples that agree: every element of every output within its tolerance of the live answer. 0: not judged."""
    max_top1_flips: float = 1.0
    """The share of rows with another largest element, in outputs that look like scores of classes. 1: not judged."""
    tolerance: dict[str, Close] = {}
    """By output; `*` is every one that is not named. Otherwise 0.001 + 0.01 of the live value."""
    max_latency_ratio: float = 5.0
    """The median over pairs of runs on the same input; judged when its runs take a millisecond or more."""
    max_error_ratio: float = 0.02
    """The share of copies that it fails."""
    max_crashes: int = 0
    """Of the serving process, in which it runs."""
    duration_s: float = 60.0
    """When it ends well, with `min_samples`."""
    max_duration_s: float = 3600.0
    """When it is over, with as many samples as came; then only a release of which most went wrong is refused."""
    without_memory: Literal["skip", "wait"] = "skip"
    """Where memory does not allow both versions: go on without having compared, or wait until it does."""

    def __post_init__(self) -> None:
        for name in ("share", "min_agreement", "max_top1_flips", "max_error_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} of shadow is {getattr(self, name)}; it must be from 0 to 1")
        if self.share == 0 or not 0 < self.max_rate <= 1000 or self.max_latency_ratio <= 0:
            raise ValueError("share, max_rate and max_latency_ratio of shadow must be above 0, max_rate at most 1000")
        if not 0 < self.duration_s <= self.max_duration_s:
            raise ValueError("duration_s of shadow must be above 0 and at most max_duration_s")
        if self.min_samples < 1 or self.max_crashes < 0:
            raise ValueError("min_samples of shadow must be at least 1, max_crashes not negative")


class CanaryRules(Document, frozen=True, kw_only=True):
    """The release answers `share` of the requests before it is activated.

    It is judged by the watch's rules against the active version over the same time. It ends well after `duration_s` with
    `min_requests` answered, or after `max_duration_s`.
    """

    share: float = 0.1
    """Of the requests that name no version; exact over time. A sequence stays on the version where it began."""
    duration_s: float = 300.0
    """When it ends well, with `min_requests`."""
    max_duration_s: float = 3600.0
    """When it ends with fewer."""
    min_requests: int = 20
    """Answered by the release."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share of canary is {self.share}; it must be above 0 and at most 1")
        if not 0 < self.duration_s <= self.max_duration_s:
            raise ValueError("duration_s of canary must be above 0 and at most max_duration_s")
        if self.min_requests < 0:
            raise ValueError("min_requests of canary must not be negative")


class Acceptance(Document, frozen=True, kw_only=True):
    """What a device demands of the release before and after it serves. Limits are per device, for the variant it runs."""

    golden: tuple[GoldenCase, ...] = ()
    max_p95_ms: float | None = None
    max_memory_bytes: int | None = None
    max_trial_s: float = 120.0
    shadow: ShadowRules | None = None
    """None: a rollout of mode shadow runs it on copies with the default rules; any other does not."""
    canary: CanaryRules | None = None
    watch: WatchRules = WatchRules()
    offline_commit: bool | None = None
    """Whether the release may stay on a device that cannot report that its watch ended well. None: on one that could not report
    before either, because then it is not the release that cut it off. True: always. False: nowhere."""
    approval: bool = False
    """It serves only after somebody on the device has said so: `edge-agent approve`."""
    priority: int = 100
    """When several models are updated at once, the smaller number is fetched and tried first."""
    lease_s: float | None = None
    """The model is stopped when the fleet's last signed word is older than this, and comes back with the next one. None: it
    serves on."""

    def __post_init__(self) -> None:
        if self.lease_s is not None and self.lease_s < MIN_LEASE_S:
            raise ValueError(
                f"lease_s is {self.lease_s:g}; it must be at least {MIN_LEASE_S:g}: devices look for news at intervals"
            )
