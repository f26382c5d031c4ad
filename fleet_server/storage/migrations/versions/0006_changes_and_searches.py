"""numbers for the changes of devices, and columns and indexes that devices are searched and counted by"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

AT_ONCE = 500
NEW_COLUMNS: tuple[sa.Column[Any], ...] = (
    sa.Column("change", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("said", sa.String(length=32), nullable=True),
    sa.Column("hardware_class", sa.String(length=512), nullable=True),
    sa.Column("problem", sa.String(length=256), nullable=True),
    sa.Column("trouble", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("expires", sa.Float(), nullable=True),
)
INDEXES = (
    ("ix_devices_change", "devices", ["change"]),
    ("ix_devices_hardware_class", "devices", ["hardware_class"]),
    ("ix_devices_problem", "devices", ["problem"]),
    ("ix_devices_seen", "devices", ["revoked", "present", "last_seen"]),
    ("ix_devices_trouble", "devices", ["trouble", "id"]),
    ("ix_devices_expires", "devices", ["revoked", "expires"]),
    ("ix_devices_shared", "devices", ["shared"]),
    ("ix_device_groups_name", "device_groups", ["name", "device"]),
    ("ix_deleted_devices_change", "deleted_devices", ["change"]),
    ("ix_device_models_serving", "device_models", ["model", "serving", "device"]),
    ("ix_device_models_phase", "device_models", ["phase", "model", "device"]),
)


def upgrade() -> None:
    for column in NEW_COLUMNS:
        op.add_column("devices", column)
    counters = op.create_table(
        "counters",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.bulk_insert(counters, [{"name": "device_changes", "value": 1}])
    op.create_table(
        "deleted_devices",
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("change", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("device"),
    )
    op.create_table(
        "device_groups",
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("device", "name"),
    )
    _fill()
    op.drop_index("ix_device_models_model", "device_models")
    for name, table, columns in INDEXES:
        op.create_index(name, table, columns, unique=False)


def _fill() -> None:
    """What the new columns say of devices that are there already."""
    connection = op.get_bind()
    columns: list[sa.Column[Any]] = [
        sa.Column("id", sa.String()),
        *(sa.Column(name, sa.JSON()) for name in ("groups", "hardware", "state")),
    ]
    columns += [sa.Column(column.name, column.type) for column in NEW_COLUMNS]
    devices = sa.Table("devices", sa.MetaData(), *columns)
    groups = sa.table("device_groups", sa.column("device"), sa.column("name"))
    certificates = sa.table("certificates", *map(sa.column, ("device", "expires", "revoked")))
    ends = sa.select(sa.func.max(certificates.c.expires)).where(
        certificates.c.device == devices.c.id, certificates.c.revoked.is_(None)
    )
    connection.execute(sa.update(devices).values(expires=ends.scalar_subquery()))
    statement = (
        sa.update(devices)
        .where(devices.c.id == sa.bindparam("key"))
        .values({name: sa.bindparam(name) for name in ("hardware_class", "problem", "trouble")})
    )
    last = ""
    while rows := connection.execute(
        sa.select(*(devices.c[name] for name in ("id", "groups", "hardware", "state")))
        .where(devices.c.id > last)
        .order_by(devices.c.id)
        .limit(AT_ONCE)
    ).all():
        last = rows[-1].id
        connection.execute(statement, [_columns(row.id, _read(row.hardware), _read(row.state)) for row in rows])
        members = [{"device": row.id, "name": name} for row in rows for name in dict.fromkeys(_read(row.groups) or ())]
        if members:
            connection.execute(sa.insert(groups), members)


def _read(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _columns(device: str, hardware: Any, state: Any) -> dict[str, Any]:
    """As the version of this migration fills them with each report."""
    kind = None
    if isinstance(hardware, dict) and hardware:
        kind = "/".join(str(hardware.get(part) or "-") for part in ("arch", "machine", "accelerator"))[:512]
    state = state if isinstance(state, dict) else {}
    problem = state.get("problem")
    trouble = bool(problem) or any(_is_bad(model) for model in (state.get("models") or {}).values())
    return {"key": device, "hardware_class": kind, "problem": problem and str(problem)[:256], "trouble": trouble}


def _is_bad(model: dict[str, Any]) -> bool:
    if model.get("serving") is None or model.get("phase") == "quarantined":
        return True
    last = max(model.get("answers") or [], key=lambda answer: float(answer.get("at") or 0.0), default=None)
    if last is None or last.get("outcome") in {"committed", "shadowed"}:
        return False
    return model.get("wanted") in {None, last.get("release")}
