"""Faster equals of the reference written with library ops alone: they run on every device, compile and export."""
