"""``tael bench``: what a model gives on this machine; its speed, unless told what to measure."""

from __future__ import annotations

import click

from tael.cli import bench_context, bench_speed


class _SpeedUnlessNamed(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = [bench_speed.command.name or "", *args]
        return super().parse_args(ctx, args)


command = _SpeedUnlessNamed(
    "bench",
    help="Measure speed, which is the default, or the effective context.",
    commands=[bench_speed.command, bench_context.command],
)
