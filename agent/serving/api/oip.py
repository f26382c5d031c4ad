"""The Open Inference Protocol as the form of a prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.serving.answers import Answer, FilledTemplate, Refusal
from agent.serving.api.oip_request import Plan, read_request
from agent.serving.api.oip_response import write_response
from agent.serving.models.version import Version
from agent.serving.prediction import Form
from agent.serving.routes import Request
from agent.serving.scheduling.demand import SequenceDemand
from runtimes.contract import Array

MAX_PLAN_KEY_BYTES = 2048  # JSON parts without data are far smaller
MAX_PLANS = 64  # per version; callers use a few shapes
SEQUENCE_ID = b'"sequence_id"'


class OipForm(Form):
    """A request with the same JSON part as an earlier one is not read again: its plan is remembered with the version."""

    def read(self, version: Version, call: Request) -> Plan:
        if call.plan is not None and call.plan[0] is version:
            known: Plan = call.plan[1]
            return known
        body, length = call.body, call.header_length
        if length is not None and length > len(body):
            raise Refusal(400, f"inference header size should be in range (0, {len(body)}), got: {length}")
        key = b""
        if length and length <= MAX_PLAN_KEY_BYTES:
            key = bytes(body[:length])
            found: Plan | None = version.plans.get(key)
            if found is not None and found.size_bytes == len(body):
                call.plan = (version, found)
                return found
        if call.allowance is not None and call.allowance.made:
            call.allowance.again()
        plan = read_request(body, length, version.name, version.inputs, version.outputs, version.interfaces, call.allowance)
        if plan.reusable:
            call.plan = (version, plan)
            if key:
                if len(version.plans) >= MAX_PLANS:
                    version.plans.clear()
                version.plans[key] = plan
        return plan

    def feeds(self, _version: Version, plan: Plan, call: Request) -> Mapping[str, Array]:
        return plan.feeds(call.body, call.regions, strays=call.strays, allowance=call.allowance)

    def lasts(self, plan: Plan, call: Request) -> bool:
        return plan.lasting and not call.strays

    def sequence(self, version: Version, call: Request) -> SequenceDemand | None:
        length = len(call.body) if call.header_length is None else call.header_length
        if SEQUENCE_ID not in bytes(call.body[:length]):
            return None
        try:
            return self.read(version, call).sequence
        except Refusal:
            return None  # whichever version answers says what is wrong with it

    def write(self, version: Version, plan: Plan, call: Request, arrays: Sequence[Array]) -> Answer:
        if plan.templates:
            template = plan.templates.get(arrays[0].shape if len(arrays) == 1 else tuple([a.shape for a in arrays]))
            if template is not None:
                return FilledTemplate(template, arrays)
        return write_response(plan, arrays, version.name, version.number_text, version.labels, call.regions)


OIP = OipForm()
