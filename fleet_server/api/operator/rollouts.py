"""Routes about what the fleet runs: models, rollouts, exclusions, the assignment, bundles."""

from __future__ import annotations

from typing import Protocol

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from agent.contract.assignment import Assignment
from agent.contract.scopes import Scope, scope_of
from fleet_server.access import Role
from fleet_server.api.operator.bodies import NewBundle, NewRollout, PlannedRollout, Rollback, RuleEnd, Superseding
from fleet_server.api.operator.routes import Limit, Number, Raw, Route, Seq, actor_of, ref_of
from fleet_server.errors import Invalid
from fleet_server.freezes import moment
from fleet_server.rollouts.assignment import FleetAssignment
from fleet_server.rollouts.bundles import Bundles
from fleet_server.rollouts.commands import Rollouts
from fleet_server.rollouts.evidence import Evidence, Recorder
from fleet_server.rollouts.exclusions import ExclusionView
from fleet_server.rollouts.gates import Standing
from fleet_server.rollouts.moves import ChangePreview
from fleet_server.rollouts.preview import RolloutPreview
from fleet_server.rollouts.views import ModelView, RolloutDetail, RolloutView, RuleView, StandingPage, VerdictView, Views
from fleet_server.rollouts.what_runs import RolledBack

TAR = "application/x-tar"


class Parts(Protocol):
    assignment: FleetAssignment
    bundles: Bundles
    rollouts: Rollouts
    recorder: Recorder
    views: Views


def models(parts: Parts) -> list[ModelView]:
    """Lists models with the release that every device runs and the one before."""
    return parts.views.models()


def roll_back(parts: Parts, request: Request, model: str, body: Rollback) -> RolledBack:
    """Takes every device to an earlier release of the model at once."""
    return parts.rollouts.roll_back(actor_of(request), model, body.to, forward=body.forward, scope=scope_in(body.scope))


def plan_roll_back(parts: Parts, request: Request, model: str, body: Rollback) -> ChangePreview:
    """What a rollback would do: how many devices change what they run, how many are there now, how much they fetch. Nothing is changed."""
    return parts.rollouts.preview_roll_back(actor_of(request), model, body.to, forward=body.forward, scope=scope_in(body.scope))


def remove_rule(parts: Parts, request: Request, model: str, body: RuleEnd) -> RuleView:
    """Ends the rule of a scope: its devices follow the next rule at once, in the end what everyone does."""
    return parts.rollouts.remove_rule(actor_of(request), model, scope_in(body.scope))


def scope_in(texts: list[str]) -> Scope:
    """Raises: Invalid."""
    try:
        return scope_of(texts)
    except ValueError as error:
        raise Invalid(str(error), code="bad_scope") from error


def rollouts(parts: Parts, model: str | None = None, limit: Limit = 100) -> list[RolloutView]:
    """Lists rollouts, newest first."""
    return parts.views.rollouts(model=model, limit=limit)


def rollout(parts: Parts, rollout: str) -> RolloutDetail:
    """One rollout with its waves and the newest verdicts of its gates."""
    return parts.views.rollout(rollout)


def rollout_verdicts(parts: Parts, rollout: str, before: Seq = None, limit: Limit = 100) -> list[VerdictView]:
    """Verdicts of a rollout's gates, the newest ones, or the newest before one of them. In their order."""
    return parts.views.verdicts(rollout, before=before, limit=limit)


def rollout_evidence(parts: Parts, rollout: str, after: Seq = None, limit: Limit = 1000) -> Evidence:
    """Everything that a rollout was judged by, so that it can be judged again. Ask again with `after` set to `next` for more samples."""
    return parts.recorder.evidence(rollout, after=after or 0, limit=limit)


def rollout_devices(
    parts: Parts, rollout: str, standing: Standing | None = None, limit: Limit = 100, after: str = ""
) -> StandingPage:
    """The devices in the scope of a rollout, by id, and how each stands to its release, those that left it included. Ask again with `after`
    set to `next`. `pending` as a standing: all that have still to answer.
    """
    return parts.views.devices(rollout, standing=standing, limit=limit, after=after)


def plan(parts: Parts, body: PlannedRollout) -> list[RolloutPreview]:
    """What a rollout would reach, wave by wave, and what would stand in its way. Nothing is begun."""
    refs = [ref_of(body.release), *(ref_of(text) for text in body.team)]
    return parts.views.preview(refs, body.waves, body.groups, _permille(body), scope_in(body.scope))


def _permille(body: PlannedRollout) -> int | None:
    return None if body.percent is None else max(1, round(body.percent * 10))


def start_rollout(parts: Parts, request: Request, body: NewRollout) -> RolloutDetail:
    """Begins a rollout: the first wave is what is named, then every device."""
    return parts.rollouts.start(
        actor_of(request), ref_of(body.release), waves=body.waves, groups=body.groups, permille=_permille(body), confirm=body.confirm,
        max_failures=body.max_failures, team=[ref_of(text) for text in body.team], window=body.window, mode=body.mode,
        min_share=body.min_share, time_limit_s=body.time_limit_s, at_once=body.at_once, failure_share=body.failure_share,
        bake_s=body.bake_s, rate=body.rate, starts=_moment(body.starts), retry=body.retry, scope=scope_in(body.scope),
    )  # fmt: skip


def _moment(text: str | None) -> float | None:
    try:
        return None if text is None else moment(text)
    except ValueError as error:
        raise Invalid(str(error)) from error


def approve(parts: Parts, request: Request, rollout: str) -> RolloutDetail:
    """Lets a rollout begin that another person started (`rollouts.approval` in fleet.yaml)."""
    return parts.rollouts.approve(actor_of(request), rollout)


def promote(parts: Parts, request: Request, rollout: str) -> RolloutDetail:
    """Confirms that the next wave of a rollout begins."""
    return parts.rollouts.promote(actor_of(request), rollout)


def plan_promote(parts: Parts, request: Request, rollout: str) -> ChangePreview:
    """What the next wave would do once it has told all of its devices. Nothing is changed."""
    return parts.rollouts.preview_promote(actor_of(request), rollout)


def pause(parts: Parts, request: Request, rollout: str) -> RolloutDetail:
    """Begins no further wave; devices already reached go on."""
    return parts.rollouts.pause(actor_of(request), rollout)


def resume(parts: Parts, request: Request, rollout: str) -> RolloutDetail:
    """Lets a paused rollout go on."""
    return parts.rollouts.resume(actor_of(request), rollout)


def abort(parts: Parts, request: Request, rollout: str) -> RolloutDetail:
    """Ends a rollout: every device goes back to the release before."""
    return parts.rollouts.abort(actor_of(request), rollout)


def supersede(parts: Parts, request: Request, rollout: str, body: Superseding) -> RolloutDetail:
    """Lets a newer release take the place of a rollout that is under way; nobody goes back in between. Answers the new rollout."""
    return parts.rollouts.supersede(actor_of(request), rollout, ref_of(body.release), waves=body.waves, confirm=body.confirm)


def complete(parts: Parts, request: Request, rollout: str) -> RolloutDetail:
    """Ends a rollout as if its last wave had passed: every device is assigned the release now."""
    return parts.rollouts.complete(actor_of(request), rollout)


def retry(parts: Parts, request: Request, rollout: str) -> RolloutDetail:
    """Lets all devices of a rollout that refused its release try it again, also after its end."""
    return parts.rollouts.retry(actor_of(request), rollout)


def retry_device(parts: Parts, request: Request, rollout: str, device: str) -> RolloutDetail:
    """Lets one device that refused the release of a rollout try it again, also after its end."""
    return parts.rollouts.retry(actor_of(request), rollout, device)


def skip(parts: Parts, request: Request, rollout: str, device: str) -> RolloutDetail:
    """Takes a device out of a rollout's count: no wave waits for it, and what it answers says nothing of the release."""
    return parts.rollouts.skip(actor_of(request), rollout, device)


def unskip(parts: Parts, request: Request, rollout: str, device: str) -> RolloutDetail:
    """Lets a device that was skipped count again."""
    return parts.rollouts.unskip(actor_of(request), rollout, device)


def exclusions(parts: Parts, model: str | None = None) -> list[ExclusionView]:
    """Lists hardware classes that are excluded from a release, with the devices that refused it."""
    return parts.views.exclusions(model=model)


def end_exclusion(parts: Parts, request: Request, number: Number) -> ExclusionView:
    """Lets an excluded hardware class have the release after all. It is not excluded from it again."""
    return parts.rollouts.end_exclusion(actor_of(request), number)


def bundle(parts: Parts, request: Request, body: NewBundle) -> Response:
    """What devices without a network should run, in one file for `edge-agent import`. A tar of signed documents and blobs."""
    packed = parts.bundles.pack(
        actor_of(request), models=body.models, devices=body.devices, group=body.group, valid_days=body.valid_days
    )
    return StreamingResponse(packed.chunks(), media_type=TAR, headers={"Content-Length": str(packed.size_bytes)})


def assignment(parts: Parts) -> Assignment:
    """The document devices read, as it is signed now."""
    return parts.assignment.signed()


ROUTES = (
    Route("GET", "/models", models, Role.VIEWER),
    Route("POST", "/models/{model}/rollback", roll_back, Role.OPERATOR),
    Route("POST", "/models/{model}/rollback/plan", plan_roll_back, Role.VIEWER),
    Route("POST", "/models/{model}/rules/remove", remove_rule, Role.OPERATOR),
    Route("GET", "/rollouts", rollouts, Role.VIEWER),
    Route("GET", "/rollouts/{rollout}", rollout, Role.VIEWER),
    Route("GET", "/rollouts/{rollout}/devices", rollout_devices, Role.VIEWER),
    Route("GET", "/rollouts/{rollout}/evidence", rollout_evidence, Role.VIEWER),
    Route("GET", "/rollouts/{rollout}/verdicts", rollout_verdicts, Role.VIEWER),
    Route("POST", "/rollouts", start_rollout, Role.OPERATOR),
    Route("POST", "/rollouts/plan", plan, Role.VIEWER),
    Route("POST", "/rollouts/{rollout}/approve", approve, Role.OPERATOR),
    Route("POST", "/rollouts/{rollout}/promote", promote, Role.OPERATOR),
    Route("POST", "/rollouts/{rollout}/promote/plan", plan_promote, Role.VIEWER),
    Route("POST", "/rollouts/{rollout}/pause", pause, Role.OPERATOR),
    Route("POST", "/rollouts/{rollout}/resume", resume, Role.OPERATOR),
    Route("POST", "/rollouts/{rollout}/abort", abort, Role.OPERATOR),
    Route("POST", "/rollouts/{rollout}/supersede", supersede, Role.OPERATOR),
    Route("POST", "/rollouts/{rollout}/complete", complete, Role.OPERATOR),
    Route("POST", "/rollouts/{rollout}/retry", retry, Role.OPERATOR),
    Route("POST", "/rollouts/{rollout}/devices/{device}/retry", retry_device, Role.OPERATOR),
    Route("POST", "/rollouts/{rollout}/devices/{device}/skip", skip, Role.OPERATOR),
    Route("DELETE", "/rollouts/{rollout}/devices/{device}/skip", unskip, Role.OPERATOR),
    Route("GET", "/exclusions", exclusions, Role.VIEWER),
    Route("POST", "/exclusions/{number}/end", end_exclusion, Role.OPERATOR),
    Route("POST", "/bundles", bundle, Role.OPERATOR, answer=Raw(TAR, {"type": "string", "format": "binary"})),
    Route("GET", "/assignment", assignment, Role.VIEWER),
)
