"""Schedules for CPUs: query rows in the vector lanes where they are many, else the head width."""

from __future__ import annotations

from deft_tvm.schedules.cpu.merge import schedule_merge
from deft_tvm.schedules.cpu.rows_in_lanes import rows_in_lanes
from deft_tvm.schedules.cpu.rows_in_tiles import rows_in_tiles
from deft_tvm.schedules.cpu.width_in_lanes import width_in_lanes
from deft_tvm.schedules.rule import Rule

__all__ = ["RULES", "schedule_merge"]

RULES: tuple[Rule, ...] = (rows_in_tiles, rows_in_lanes, width_in_lanes)
