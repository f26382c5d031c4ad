"""Why a device refused, failed or rolled back: one code per cause, the same on the device, in reports, in the API and on the
page.
"""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """Stable codes; the text beside them in a report says the rest. New ones may be added, none renamed."""

    # trust: refused before a byte of the release is used
    BAD_SIGNATURE = "bad_signature"
    BELOW_THRESHOLD = "below_threshold"
    EXPIRED_METADATA = "expired_metadata"
    METADATA_ROLLBACK = "metadata_rollback"
    REPLAYED_ASSIGNMENT = "replayed_assignment"
    MIX_AND_MATCH = "mix_and_match"
    HASH_MISMATCH = "hash_mismatch"
    WRONG_RELEASE = "wrong_release"
    WRONG_FLEET = "wrong_fleet"
    UNREADABLE = "unreadable"
    BAD_MANIFEST = "bad_manifest"
    WITHDRAWN = "withdrawn"
    CLOCK_UNTRUSTED = "clock_untrusted"

    # fetching
    DOWNLOAD_FAILED = "download_failed"
    ENDLESS_DATA = "endless_data"
    SLOW_RETRIEVAL = "slow_retrieval"
    NO_SPACE = "no_space"
    STORE_FAILED = "store_failed"

    # does not fit this device
    NO_VARIANT = "no_variant"

    # trial
    LOAD_FAILED = "load_failed"
    WRONG_INTERFACE = "wrong_interface"
    GOLDEN_MISMATCH = "golden_mismatch"
    TOO_SLOW = "too_slow"
    TOO_MUCH_MEMORY = "too_much_memory"
    TRIAL_CRASHED = "trial_crashed"
    TRIAL_TIMED_OUT = "trial_timed_out"
    TRIAL_FORKED = "trial_forked"
    TRIAL_NETWORK = "trial_network"
    TRIAL_WROTE = "trial_wrote"
    TRIAL_SCRATCH = "trial_scratch"
    INTERRUPTED_TOO_OFTEN = "interrupted_too_often"

    # beside the one that serves
    SHADOW_DISAGREES = "shadow_disagrees"
    SHADOW_ERRORS = "shadow_errors"
    SHADOW_TOO_SLOW = "shadow_too_slow"

    # activation and watch
    ACTIVATION_FAILED = "activation_failed"
    ERROR_RATIO = "error_ratio"
    LATENCY_RATIO = "latency_ratio"
    SERVE_CRASHED = "serve_crashed"
    CANNOT_REPORT = "cannot_report"
    TOGETHER = "together"
    LEASE_ENDED = "lease_ended"

    # people
    OPERATOR = "operator"


METADATA = frozenset(
    {
        Reason.BAD_SIGNATURE,
        Reason.BELOW_THRESHOLD,
        Reason.METADATA_ROLLBACK,
        Reason.REPLAYED_ASSIGNMENT,
        Reason.MIX_AND_MATCH,
        Reason.WRONG_RELEASE,
        Reason.WRONG_FLEET,
        Reason.UNREADABLE,
        Reason.BAD_MANIFEST,
    }
)
"""Refused for what was signed about the release, before a byte of it was used: judged anew as soon as the signed metadata
changes, and by every rollout for itself."""

RETRYABLE = frozenset(
    {
        Reason.EXPIRED_METADATA,
        Reason.CLOCK_UNTRUSTED,
        Reason.DOWNLOAD_FAILED,
        Reason.ENDLESS_DATA,
        Reason.SLOW_RETRIEVAL,
        Reason.NO_SPACE,
        Reason.STORE_FAILED,
        Reason.CANNOT_REPORT,
        Reason.TOGETHER,
        Reason.LEASE_ENDED,
    }
)
"""Causes that lie outside the release: the device tries again later and does not quarantine it."""
