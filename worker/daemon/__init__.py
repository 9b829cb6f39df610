"""Processes: start, watch, end. Imports every other room; nobody imports it."""
