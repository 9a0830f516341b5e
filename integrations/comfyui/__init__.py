"""UniLIP for ComfyUI. In: this folder under ComfyUI's `custom_nodes`. Out: the five nodes of nodes.py."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
