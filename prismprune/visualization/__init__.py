"""Pictures of what a selection kept."""

from prismprune.visualization.kept import draw_kept, draw_sheet

__all__ = ["draw_kept", "draw_sheet"]
