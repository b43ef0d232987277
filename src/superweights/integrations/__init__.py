"""Bridges to other tools: each file works only where its tool is installed, and says so where it is not."""
